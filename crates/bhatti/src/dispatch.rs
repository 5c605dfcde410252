//! From the parsed command line to the command that runs.

use std::process::ExitCode;

use clap::CommandFactory;

use crate::cli::{Cli, Command};
use crate::commands::{
    Context, bench, completion, create, destroy, doctor, edit, events, exec, file, fork, forward,
    image, inspect, jobs, key, kill, lifecycle, list, login, logs, man, ports, ps, publish, run,
    secret, serve, setup, shell, snapshot, template, user, version, volume, wait,
};
use crate::error::CliError;
use crate::options::Global;
use crate::output::Output;

/// Runs the command of a parsed command line.
pub(crate) fn run_cli(cli: Cli, output: &Output) -> Result<ExitCode, CliError> {
    let Cli { global, command } = cli;
    let context = Context::new(&global, *output)?;
    if let Command::Serve(arguments) = command {
        return serve::run(&context, &arguments);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(run_client(&context, &global, command));
    // Do not wait for a thread that still reads standard input.
    runtime.shutdown_background();
    result
}

async fn run_client(
    context: &Context,
    global: &Global,
    command: Command,
) -> Result<ExitCode, CliError> {
    match command {
        Command::Setup(arguments) => setup::run(context, global, arguments).await,
        Command::Serve(_) => Ok(()),
        Command::Run(arguments) => return run::run(context, arguments).await,
        Command::Create(arguments) => create::run(context, arguments).await,
        Command::List(arguments) => list::run(context, &arguments).await,
        Command::Inspect(arguments) => inspect::run(context, &arguments).await,
        Command::Exec(arguments) => return exec::run(context, arguments).await,
        Command::Shell(arguments) => return shell::run(context, arguments).await,
        Command::Ps(arguments) => ps::run(context, &arguments).await,
        Command::Jobs(arguments) => jobs::run(context, &arguments).await,
        Command::Job(command) => return jobs::job(context, command).await,
        Command::Kill(arguments) => kill::run(context, &arguments).await,
        Command::Logs(arguments) => logs::run(context, &arguments).await,
        Command::Wait(arguments) => return wait::run(context, &arguments).await,
        Command::Edit(arguments) => edit::run(context, arguments).await,
        Command::Pause(arguments) => lifecycle::pause(context, &arguments).await,
        Command::Resume(arguments) => lifecycle::resume(context, &arguments).await,
        Command::Stop(arguments) => lifecycle::stop(context, &arguments).await,
        Command::Start(arguments) => lifecycle::start(context, &arguments).await,
        Command::Fork(arguments) => fork::run(context, arguments).await,
        Command::Destroy(arguments) => destroy::run(context, &arguments).await,
        Command::Cp(arguments) => file::copy_paths(context, arguments).await,
        Command::File(command) => file::run(context, command).await,
        Command::Snapshot(command) => snapshot::run(context, command).await,
        Command::Volume(command) => volume::run(context, command).await,
        Command::Secret(command) => secret::run(context, command).await,
        Command::Template(command) => template::run(context, command).await,
        Command::Image(command) => image::run(context, command).await,
        Command::Publish(arguments) => publish::publish(context, arguments).await,
        Command::Unpublish(arguments) => publish::unpublish(context, &arguments).await,
        Command::Ports(arguments) => ports::run(context, &arguments).await,
        Command::Forward(arguments) => forward::run(context, &arguments).await,
        Command::Login(arguments) => login::login(context, arguments).await,
        Command::Context(command) => login::run(context, command),
        Command::Key(command) => key::run(context, command).await,
        Command::User(command) => user::run(context, command).await,
        Command::Events(arguments) => events::run(context, arguments).await,
        Command::Metrics => context.output.print(&context.client.metrics().await?),
        Command::Doctor => return doctor::run(context).await,
        Command::Bench(arguments) => bench::run(context, &arguments).await,
        Command::Man(arguments) => man::run(&arguments, Cli::command()),
        Command::Completion(arguments) => completion::run(context, &arguments, &mut Cli::command()),
        Command::Version => version::run(context),
    }
    .map(|()| ExitCode::SUCCESS)
}
