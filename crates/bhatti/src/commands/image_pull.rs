//! `bhatti image pull`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;

use bhatti_image::{ImageStore, ImageSummary};
use bhatti_node::{ImagePuller, PullProgress};
use bhatti_registry::{
    Blob, Config as RegistryConfig, Credentials, Reference, Registries, docker_credentials,
};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::Context;
use crate::config::Config;
use crate::error::CliError;
use crate::output::bytes;
use crate::paths;

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// Image, such as python:3.12-slim or registry.example.com/team/app@sha256:…
    reference: Reference,
}

/// Pulls an image into the data directory of a daemon on this machine.
pub(crate) async fn pull(context: &Context, arguments: Pull) -> Result<(), CliError> {
    let Pull { reference } = arguments;
    let output = context.output;
    paths::create_data_dir(&context.data_dir)?;
    let registries = Config::read(&context.data_dir)?.registries;
    let puller = puller(context, registries)?;
    let credentials = docker_login(&reference)?;
    let is_visible = output.terminal && !output.json && !output.quiet;
    let progress: Arc<dyn PullProgress> =
        if is_visible { Arc::new(Bars::default()) } else { Arc::new(Silent) };
    let pulled = puller.pull(&reference, credentials.as_ref(), progress).await;
    let image = pulled.map_err(|error| CliError::of(&error))?;
    let ImageSummary { name, disk_bytes, .. } = &image;
    output.show(&serde_json::json!({ "image": name, "disk_bytes": disk_bytes }), |_| {
        format!("pulled {name} ({} on disk): bhatti create --image {name}", bytes(*disk_bytes))
    })
}

fn puller(
    context: &Context,
    registries: BTreeMap<String, bhatti_registry::Registry>,
) -> Result<ImagePuller, CliError> {
    let config = RegistryConfig { registries, authorities: Vec::new() };
    let registries = Registries::new(config).map_err(|error| CliError::of(&error))?;
    Ok(ImagePuller::new(ImageStore::new(&context.data_dir), registries))
}

/// Returns what `docker login` has saved for a reference's registry.
fn docker_login(reference: &Reference) -> Result<Option<Credentials>, CliError> {
    let directory = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let directory = directory.or_else(|| Some(std::env::home_dir()?.join(".docker")));
    let Some(directory) = directory else { return Ok(None) };
    let path = directory.join("config.json");
    docker_credentials(&path, reference.registry())
        .map_err(|error| CliError::new(format!("failed to read `{}`: {error}", path.display())))
}

/// Shows nothing.
struct Silent;

impl PullProgress for Silent {
    fn begin(&self, _: &[Blob]) {}
    fn arrived(&self, _: usize, _: i64) {}
    fn unpacked(&self, _: usize) {}
}

/// A bar for each layer.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    layers: Mutex<Vec<ProgressBar>>,
}

impl PullProgress for Bars {
    fn begin(&self, layers: &[Blob]) {
        let style = ProgressStyle::with_template(
            "{prefix} {bar:24} {binary_bytes:>10} of {binary_total_bytes:10} {msg}",
        );
        let mut bars = self.layers.lock();
        for layer in layers {
            let bar = self.all.add(ProgressBar::new(layer.bytes));
            if let Ok(style) = &style {
                bar.set_style(style.clone());
            }
            bar.set_prefix(layer.sha256.chars().take(12).collect::<String>());
            bars.push(bar);
        }
    }

    fn arrived(&self, layer: usize, bytes: i64) {
        if let Some(bar) = self.layers.lock().get(layer) {
            bar.set_position(bar.position().saturating_add_signed(bytes));
        }
    }

    fn unpacked(&self, layer: usize) {
        if let Some(bar) = self.layers.lock().get(layer) {
            bar.finish_with_message("unpacked");
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        if std::io::stderr().is_terminal() {
            drop(self.all.clear());
        }
    }
}
