//! `bhatti image pull`, `push` and `save`, and pulls ahead of a new sandbox.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use bhatti_api::{
    ErrorCode, LayerProgress, Operation, PullImage, PushImage, RegistryLogin, SaveImage,
};
use bhatti_client::ClientError;
use bhatti_registry::{Reference, docker_credentials};
use clap::{Args, ValueEnum};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Context;
use crate::error::CliError;
use crate::output::bytes;

/// How often progress is shown.
const SHOWN_EVERY: Duration = Duration::from_millis(150);

/// How long one call waits for the end of an operation, in seconds.
const WAIT_SECONDS: u32 = 30;

/// When the image of a new sandbox is pulled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PullPolicy {
    /// If there is no image of that name
    #[default]
    Missing,
    /// In any case
    Always,
    /// Never
    Never,
}

impl PullPolicy {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// Image, such as python:3.12-slim or registry.example.com/team/app@sha256:…
    reference: Reference,
}

/// Pulls an image onto the daemon's machine.
pub(crate) async fn pull(context: &Context, arguments: Pull) -> Result<(), CliError> {
    let pulled = pull_now(context, &arguments.reference).await?;
    let image = context.client.inspect_image(&pulled.image).await?;
    context.output.show(&image, |image| {
        let (name, size) = (&image.name, bytes(image.disk_bytes));
        format!("pulled {name} ({size} on disk): bhatti create --image {name}")
    })
}

/// Pulls the image of a new sandbox if the policy says so, and shows the progress. Returns the
/// policy for the request that creates the sandbox.
pub(crate) async fn ahead(
    context: &Context,
    image: Option<&str>,
    policy: PullPolicy,
) -> Result<Option<String>, CliError> {
    // The daemon refuses a name that cannot be pulled.
    let reference = image.and_then(|image| image.parse::<Reference>().ok());
    let (Some(image), Some(reference)) = (image, reference) else { return Ok(None) };
    let is_wanted = match policy {
        PullPolicy::Never => false,
        PullPolicy::Always => true,
        PullPolicy::Missing => match context.client.inspect_image(image).await {
            Ok(_) => false,
            Err(ClientError::Refused(body)) if body.code == ErrorCode::NotFound => true,
            Err(error) => return Err(error.into()),
        },
    };
    if is_wanted {
        pull_now(context, &reference).await?;
        return Ok(Some(PullPolicy::Never.as_str().to_owned()));
    }
    Ok(Some(policy.as_str().to_owned()))
}

async fn pull_now(context: &Context, reference: &Reference) -> Result<Operation, CliError> {
    let request =
        PullImage { image: reference.to_string(), login: login(context, reference).await? };
    follow(context, context.client.pull_image(&request)).await
}

#[derive(Debug, Args)]
pub(crate) struct Push {
    /// Image to push
    image: String,
    /// Reference to push it as, such as registry.example.com/team/app:1 [default: IMAGE]
    reference: Option<Reference>,
}

/// Pushes an image to a registry.
pub(crate) async fn push(context: &Context, arguments: Push) -> Result<(), CliError> {
    let Push { image, reference } = arguments;
    let reference = match reference {
        Some(reference) => reference,
        None => image.parse().map_err(|error| CliError::of(&error))?,
    };
    let login = login(context, &reference).await?;
    let request = PushImage { to: Some(reference.to_string()), login };
    let operation = follow(context, context.client.push_image(&image, &request)).await?;
    context.output.show(&operation, |_| format!("pushed {image} as {reference}"))
}

/// Saves a sandbox as an image.
pub(crate) async fn save(context: &Context, sandbox: String, name: String) -> Result<(), CliError> {
    let request = SaveImage { sandbox, name };
    let operation = follow(context, context.client.save_image(&request)).await?;
    context.output.show(&operation, |saved| {
        format!("saved {} as {}: bhatti create --image {1}", request.sandbox, saved.image)
    })
}

/// Begins an operation and shows its progress until it has ended. Ctrl+C cancels it. A second
/// Ctrl+C ends the command even if the daemon does not answer.
async fn follow(
    context: &Context,
    begin: impl Future<Output = Result<Operation, ClientError>>,
) -> Result<Operation, CliError> {
    // They keep a signal that comes before the daemon has answered.
    let mut first = signal(SignalKind::interrupt())?;
    let mut second = signal(SignalKind::interrupt())?;
    let twice = async {
        second.recv().await;
        second.recv().await;
    };
    tokio::select! {
        ended = follow_to_end(context, begin, &mut first) => ended,
        () = twice => Err(CliError::new("interrupted before the daemon answered")
            .hint("the daemon may have begun what was asked, and go on with it")),
    }
}

async fn follow_to_end(
    context: &Context,
    begin: impl Future<Output = Result<Operation, ClientError>>,
    interrupts: &mut Signal,
) -> Result<Operation, CliError> {
    let (client, output) = (&context.client, context.output);
    let mut operation = begin.await?;
    let is_visible = output.terminal && !output.json && !output.quiet;
    let mut bars = is_visible.then(Bars::default);
    while operation.status == "running" {
        if let Some(bars) = &mut bars {
            bars.show(&operation.layers);
        }
        let next = async {
            let wait = if is_visible { 0 } else { WAIT_SECONDS };
            if is_visible {
                tokio::time::sleep(SHOWN_EVERY).await;
            }
            client.operation(&operation.id, wait).await
        };
        operation = tokio::select! {
            next = next => next?,
            _ = interrupts.recv() => client.cancel_operation(&operation.id).await?,
        };
    }
    drop(bars);
    outcome(operation, "the next one continues with the layers that have arrived")
}

/// Returns an operation that is done, or why it is not. `hint` is for one that was canceled.
pub(crate) fn outcome(operation: Operation, hint: &str) -> Result<Operation, CliError> {
    match (operation.status.as_str(), operation.error.clone()) {
        ("done", _) => Ok(operation),
        (_, Some(failure)) => {
            let error = CliError::new(failure.error);
            Err(match failure.hint {
                Some(hint) => error.hint(hint),
                None => error,
            })
        }
        (_, None) => {
            let what = format!("the {} of {} was canceled", operation.kind, operation.image);
            Err(CliError::new(what).hint(hint))
        }
    }
}

/// Returns the login for a reference's registry that is sent with a request: what `docker login`
/// has saved, unless the daemon keeps a login there.
async fn login(
    context: &Context,
    reference: &Reference,
) -> Result<Option<RegistryLogin>, CliError> {
    let Some(saved) = docker_login(reference)? else { return Ok(None) };
    let kept = context.client.list_registry_logins().await?;
    let is_kept = kept.iter().any(|login| login.registry == reference.registry());
    Ok((!is_kept).then_some(saved))
}

/// Returns what `docker login` has saved for a reference's registry.
fn docker_login(reference: &Reference) -> Result<Option<RegistryLogin>, CliError> {
    let directory = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let directory = directory.or_else(|| Some(std::env::home_dir()?.join(".docker")));
    let Some(directory) = directory else { return Ok(None) };
    let path = directory.join("config.json");
    let found = docker_credentials(&path, reference.registry())
        .map_err(|error| CliError::new(format!("failed to read `{}`: {error}", path.display())))?;
    Ok(found.map(|found| RegistryLogin { username: found.user, password: found.password }))
}

/// A bar for each layer.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    layers: Vec<ProgressBar>,
}

impl Bars {
    fn show(&mut self, layers: &[LayerProgress]) {
        for layer in &layers[self.layers.len().min(layers.len())..] {
            self.add(layer);
        }
        for (bar, layer) in self.layers.iter().zip(layers) {
            bar.set_position(layer.arrived);
            if layer.unpacked && !bar.is_finished() {
                bar.finish_with_message("unpacked");
            }
        }
    }

    fn add(&mut self, layer: &LayerProgress) {
        let bar = self.all.add(ProgressBar::new(layer.bytes));
        let style = ProgressStyle::with_template(
            "{prefix} {bar:24} {binary_bytes:>10} of {binary_total_bytes:10} {msg}",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        let digest = layer.digest.trim_start_matches("sha256:");
        bar.set_prefix(digest.chars().take(12).collect::<String>());
        self.layers.push(bar);
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        if std::io::stderr().is_terminal() {
            drop(self.all.clear());
        }
    }
}
