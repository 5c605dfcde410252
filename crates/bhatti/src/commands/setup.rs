//! `bhatti setup`.

mod progress;

use bhatti_image::{ImageStore, KernelSource, SetupOptions, set_up};

use super::Context;
use crate::cli::Setup;
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
    let images = store.images().map_err(|error| CliError::of(&error))?;
    let directory = store.directory().display().to_string();
    context.output.show(&serde_json::json!({ "images": images, "directory": directory }), |_| {
        format!("ready: {}", images.join(", "))
    })
}
