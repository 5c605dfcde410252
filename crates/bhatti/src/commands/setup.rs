//! `bhatti setup`.

mod interpreter;
pub(super) mod progress;

use std::path::PathBuf;
use std::sync::Arc;

use bhatti_image::{ImageStore, KernelSource, SetupOptions, set_up};
use bhatti_store::Store;
use clap::Args;
use serde_json::json;
use tokio::time::Instant;

use super::{Context, control, engine, login};
use crate::config::{Config, EngineChoice};
use crate::error::CliError;
use crate::options::Global;
use crate::paths;
use progress::with_progress;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti setup\n  bhatti setup --dev\n\nWith --url, nothing is built: the URL and --token are saved as `bhatti login` does."
)]
pub(crate) struct Setup {
    /// Custom kernel, ELF vmlinux or bzImage [default: Debian's kernel for virtual machines]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Modules of --kernel, as in /lib/modules/RELEASE [default: none, all drivers must be built
    /// in]
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// Also build the image `dev`: a compiler, make, pip, venv, node, npm, ssh, less, wget, unzip,
    /// ping
    #[arg(long)]
    dev: bool,
    /// Also build the image `builder`, which builds images from Dockerfiles
    #[arg(long)]
    builder: bool,
    /// Also build the image `code-interpreter` and the template `code-interpreter-v1`, in which
    /// E2B's package of that name runs code
    #[arg(long)]
    code_interpreter: bool,
    /// CA certificate (PEM) that images built from now on trust (repeatable); to remove one,
    /// delete its file from images/ca-certificates in the data directory
    #[arg(long, value_name = "FILE")]
    ca_certificate: Vec<PathBuf>,
    /// Do not make a base snapshot or a template now; the first `create` makes the base snapshot
    #[arg(long)]
    no_template: bool,
}

pub(crate) async fn run(
    context: &Context,
    global: &Global,
    arguments: Setup,
) -> Result<(), CliError> {
    match (&global.url, &global.token) {
        (Some(url), Some(token)) => {
            login::remember(context, &login::usual_name(url), url, token).await
        }
        (Some(_), None) => Err(CliError::new("--url needs an API key")
            .hint("use `bhatti login URL`, which asks for the key")),
        (None, _) => build(context, arguments).await,
    }
}

async fn build(context: &Context, arguments: Setup) -> Result<(), CliError> {
    paths::create_data_dir(&context.data_dir)?;
    let kernel = match arguments.kernel {
        Some(image) => KernelSource::File { image, modules: arguments.modules },
        None => KernelSource::Debian,
    };
    let config = Config::read(&context.data_dir)?;
    if config.engine == EngineChoice::Qemu && !arguments.no_template {
        // Checked before the build, which takes minutes.
        engine::check_landlock(&config)?;
    }
    let options = SetupOptions {
        kernel,
        lohar: paths::lohar()?,
        dev: arguments.dev,
        builder: arguments.builder,
        interpreter: arguments.code_interpreter,
        ca_certificates: arguments.ca_certificate,
    };
    let store = ImageStore::new(&context.data_dir);
    let result =
        with_progress(context.output, async |progress| set_up(&store, &options, progress).await);
    result.await.map_err(|error| CliError::of(&error))?;
    warm_up(context, arguments.no_template).await?;
    if arguments.code_interpreter && !arguments.no_template {
        interpreter::build_template(context).await?;
    }
    let images = store.images().map_err(|error| CliError::of(&error))?;
    let directory = store.directory().display().to_string();
    context.output.show(&json!({ "images": images, "directory": directory }), |_| {
        format!("ready: {}", images.join(", "))
    })
}

/// Makes the base snapshot of the default image and shape, so that the first such sandbox is
/// created quickly.
async fn warm_up(context: &Context, skip: bool) -> Result<(), CliError> {
    if skip {
        return Ok(());
    }
    let config =
        Config { ready_vmms: Some(0), ready_forks: Some(0), ..Config::read(&context.data_dir)? };
    let store = Store::open(&context.data_dir).map_err(|error| CliError::of(&error))?;
    let control = control::make(&context.data_dir, &config, &Arc::new(store)).await?;
    let began = Instant::now();
    let made = control.warm_up().await;
    made.map_err(|error| {
        CliError::of(&error)
            .hint("run `bhatti doctor`, or skip the base snapshot: bhatti setup --no-template")
    })?;
    if !context.output.json && !context.output.quiet {
        let seconds = began.elapsed().as_secs_f64();
        let what =
            if control.capabilities().saves_memory { "base snapshot" } else { "root file system" };
        context.output.print(&format!("{what}: ready after {seconds:.1} s"))?;
    }
    Ok(())
}
