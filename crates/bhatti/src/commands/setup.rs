//! `bhatti setup`.

mod progress;

use std::sync::Arc;

use bhatti_image::{ImageStore, KernelSource, SetupOptions, set_up};
use bhatti_store::Store;
use tokio::time::Instant;

use super::{Context, supervisor};
use crate::cli::Setup;
use crate::config::Config;
use crate::error::CliError;
use crate::paths;
use progress::{Bars, Lines};

pub(super) async fn run(context: &Context, arguments: Setup) -> Result<(), CliError> {
    paths::create_data_dir(&context.data_dir)?;
    let kernel = match arguments.kernel {
        Some(image) => KernelSource::File { image, modules: arguments.modules },
        None => KernelSource::Debian,
    };
    let options = SetupOptions { kernel, lohar: paths::lohar()? };
    let store = ImageStore::new(&context.data_dir);
    let result = if context.output.terminal && !context.output.json {
        set_up(&store, &options, &mut Bars::default()).await
    } else {
        set_up(&store, &options, &mut Lines::new(context.output.json)).await
    };
    result.map_err(|error| CliError::of(&error))?;
    warm_up(context, arguments.no_template).await?;
    let images = store.images().map_err(|error| CliError::of(&error))?;
    let directory = store.directory().display().to_string();
    context.output.show(&serde_json::json!({ "images": images, "directory": directory }), |_| {
        format!("ready: {}", images.join(", "))
    })
}

/// Makes the template of the sandboxes that ask for nothing in particular, so that the first of them is created in a moment.
async fn warm_up(context: &Context, skip: bool) -> Result<(), CliError> {
    if skip {
        return Ok(());
    }
    let config =
        Config { ready_vmms: Some(0), ready_forks: Some(0), ..Config::read(&context.data_dir)? };
    let store = Store::open(&context.data_dir).map_err(|error| CliError::of(&error))?;
    let supervisor = supervisor::make(&context.data_dir, &config, &Arc::new(store)).await?;
    let began = Instant::now();
    let made = supervisor.warm_up().await;
    made.map_err(|error| {
        CliError::of(&error).hint("`bhatti doctor` says what this machine lacks; set-up without a template: --no-template")
    })?;
    if !context.output.json {
        let seconds = began.elapsed().as_secs_f64();
        context.output.print(&format!("template: ready after {seconds:.1} s"))?;
    }
    Ok(())
}
