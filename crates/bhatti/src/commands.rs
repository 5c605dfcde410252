//! The commands, one file each.

mod create;
mod destroy;
mod doctor;
mod exec;
mod fork;
mod inspect;
mod lifecycle;
mod list;
mod network;
mod serve;
mod setup;
mod snapshot;
mod supervisor;
mod user;
mod version;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;

use bhatti_client::Client;

use crate::cli::{Cli, Command, Global};
use crate::error::CliError;
use crate::output::Output;
use crate::paths;

/// What commands work with.
struct Context {
    data_dir: PathBuf,
    client: Client,
    output: Output,
}

impl Context {
    fn new(global: Global, output: Output) -> Result<Self, CliError> {
        let Global { data_dir, url, token, json: _ } = global;
        let data_dir = paths::data_dir(data_dir)?;
        let client = match url {
            Some(url) => Client::http(&url, &token.unwrap_or_default())
                .map_err(|error| CliError::of(&error))?,
            None => Client::unix(&data_dir),
        };
        Ok(Self { data_dir, client, output })
    }
}

/// Runs the command that was asked for.
pub(crate) fn run(cli: Cli, output: &Output) -> Result<ExitCode, CliError> {
    let Cli { global, command } = cli;
    let context = Context::new(global, *output)?;
    if let Command::Serve(arguments) = command {
        return serve::run(&context, &arguments);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        match command {
            Command::Setup(arguments) => setup::run(&context, arguments).await,
            Command::Serve(_) => Ok(()),
            Command::Create(arguments) => create::run(&context, arguments).await,
            Command::List => list::run(&context).await,
            Command::Inspect(target) => inspect::run(&context, &target).await,
            Command::Exec(arguments) => return exec::run(&context, arguments).await,
            Command::Pause(targets) => lifecycle::pause(&context, &targets).await,
            Command::Resume(targets) => lifecycle::resume(&context, &targets).await,
            Command::Stop(targets) => lifecycle::stop(&context, &targets).await,
            Command::Start(arguments) => lifecycle::start(&context, &arguments).await,
            Command::Fork(arguments) => fork::run(&context, arguments).await,
            Command::Destroy(targets) => destroy::run(&context, &targets).await,
            Command::Snapshot(command) => snapshot::run(&context, command).await,
            Command::Volume(command) => volume::run(&context, command).await,
            Command::User(command) => user::run(&context, command).await,
            Command::Doctor => return doctor::run(&context).await,
            Command::Version => version::run(&context),
        }
        .map(|()| ExitCode::SUCCESS)
    });
    // A thread that waits for standard input cannot be waited for.
    runtime.shutdown_background();
    result
}
