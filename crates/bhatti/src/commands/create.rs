//! `bhatti create`.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_api::{AttachVolume, CreateSandbox, Isolation, NewFile, NewVolume, Sandbox};
use bhatti_types::NEW_FILES_BYTES_MAX;
use clap::{Args, ValueEnum};
use tokio::time::Instant;

use super::Context;
use super::image_pull::{self, PullPolicy};
use crate::error::CliError;
use crate::options::parse_variable;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti create --name dev --cpus 2 --memory 1024 --env EDITOR=vi\n  bhatti create --volume data:/srv/data --file ./settings.json:/etc/app.json --label team=web\n  bhatti create --name web --image nginx:1.27 --start"
)]
pub(crate) struct Create {
    /// Name of the sandbox [default: random]
    #[arg(long)]
    name: Option<String>,
    /// Whether to fail or to return the existing sandbox if the name is taken [default: fail]
    #[arg(long, value_name = "fail|return", requires = "name")]
    if_exists: Option<IfExists>,
    /// Image to start from, a name or a reference such as python:3.12-slim [default: minimal]
    #[arg(long)]
    image: Option<String>,
    /// When to pull the image from its registry
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    pull: PullPolicy,
    /// Run the image's command as a job that restarts with the sandbox
    #[arg(long)]
    start: bool,
    /// Template that supplies the options not given here
    #[arg(long)]
    template: Option<String>,
    /// Number of virtual CPUs [default: 1]
    #[arg(long, value_name = "COUNT")]
    cpus: Option<u64>,
    /// Memory in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Root disk size in MiB; with Docker, only if Docker can limit it [default: the image's size,
    /// 4096 for images built here]
    #[arg(long, value_name = "MIB")]
    disk: Option<u64>,
    /// Environment variable to set (repeatable)
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Secret to expose as an environment variable (repeatable)
    #[arg(long, value_name = "NAME")]
    secret: Vec<String>,
    /// Local file to copy in before the init script runs, 16 MiB in total (repeatable)
    #[arg(long, value_name = "FILE:/PATH", value_parser = parse_file)]
    file: Vec<(PathBuf, String)>,
    /// Script to run when the sandbox is ready
    #[arg(long, value_name = "SCRIPT")]
    init: Option<String>,
    /// Label to set (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    label: Vec<(String, String)>,
    /// Destroy the sandbox, or stop it, after this many seconds [default: never]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// What happens after --timeout [default: destroy]
    #[arg(long, value_name = "ACTION", requires = "timeout", value_parser = ["destroy", "stop"])]
    on_timeout: Option<String>,
    /// Keep the sandbox hot while it is unused
    #[arg(long)]
    keep_hot: bool,
    /// Boot the image instead of forking its base snapshot
    #[arg(long)]
    cold_boot: bool,
    /// Network mode, nat or none [default: nat if this host supports it]
    #[arg(long, value_name = "MODE")]
    network: Option<String>,
    /// Private address range that the sandbox may reach (repeatable)
    #[arg(long, value_name = "CIDR")]
    allow_cidr: Vec<String>,
    /// Volume to mount, read-only with `:ro` (repeatable)
    #[arg(long, value_name = "NAME:/PATH[:ro]", value_parser = parse_volume)]
    volume: Vec<AttachVolume>,
    /// New volume that is deleted with the sandbox (repeatable)
    #[arg(long, value_name = "NAME:MIB:/PATH", value_parser = parse_new_volume)]
    new_volume: Vec<NewVolume>,
}

/// Result of `--if-exists` if the name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IfExists {
    Fail,
    Return,
}

pub(crate) async fn run(context: &Context, arguments: Create) -> Result<(), CliError> {
    check_sizes(&arguments.file)?;
    let pull = image_pull::ahead(context, arguments.image.as_deref(), arguments.pull).await?;
    let files = arguments.file.iter().map(|(local, path)| new_file(local, path));
    let request = CreateSandbox {
        name: arguments.name,
        cpus: arguments.cpus,
        memory_mb: arguments.memory,
        disk_mb: arguments.disk,
        env: arguments.env.into_iter().collect(),
        keep_hot: arguments.keep_hot,
        cold_boot: arguments.cold_boot,
        template: arguments.template,
        image: arguments.image,
        pull,
        start: arguments.start,
        init: arguments.init,
        files: files.collect::<Result<_, _>>()?,
        secrets: arguments.secret,
        labels: arguments.label.into_iter().collect(),
        timeout_sec: arguments.timeout,
        on_timeout: arguments.on_timeout,
        network: arguments.network,
        network_allow: arguments.allow_cidr,
        volumes: arguments.volume,
        new_volumes: arguments.new_volume,
    };
    let began = Instant::now();
    let sandbox = match arguments.if_exists {
        Some(IfExists::Return) => context.client.create_or_return(&request).await?,
        Some(IfExists::Fail) | None => context.client.create(&request).await?,
    };
    let seconds = began.elapsed().as_secs_f64();
    context
        .output
        .show_made(&sandbox, (&sandbox.id, &sandbox.name), |sandbox| made(sandbox, seconds))
}

fn made(sandbox: &Sandbox, seconds: f64) -> String {
    let made = format!("created {} ({}) in {seconds:.2} s", sandbox.name, sandbox.id);
    match sandbox.isolation {
        Isolation::Vm => made,
        Isolation::Container => format!(
            "{made}; a container, which shares this host's kernel and is less isolated than a VM"
        ),
    }
}

/// Refuses files that are too large together, before they are read.
fn check_sizes(files: &[(PathBuf, String)]) -> Result<(), CliError> {
    let mut bytes = 0;
    for (local, _) in files {
        bytes += std::fs::metadata(local).map_err(|error| unreadable(local, &error))?.len();
        if bytes > NEW_FILES_BYTES_MAX as u64 {
            let message = format!(
                "the files have more than {} MiB in total, at `{}`",
                NEW_FILES_BYTES_MAX >> 20,
                local.display()
            );
            return Err(CliError::new(message)
                .hint("copy large files after the sandbox is created: bhatti cp"));
        }
    }
    Ok(())
}

fn unreadable(local: &Path, error: &std::io::Error) -> CliError {
    CliError::new(format!("failed to read `{}`: {error}", local.display()))
}

fn new_file(local: &PathBuf, path: &str) -> Result<NewFile, CliError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |error| unreadable(local, &error);
    let content = std::fs::read(local).map_err(failed)?;
    let mode = std::fs::metadata(local).map_err(failed)?.permissions().mode() & 0o777;
    Ok(NewFile {
        path: path.to_owned(),
        content: None,
        content_base64: Some(STANDARD.encode(content)),
        mode: Some(format!("{mode:04o}")),
    })
}

fn parse_file(text: &str) -> Result<(PathBuf, String), String> {
    let (local, path) = text.rsplit_once(':').ok_or("expected FILE:/PATH")?;
    Ok((local.into(), path.to_owned()))
}

fn parse_volume(text: &str) -> Result<AttachVolume, String> {
    let (name, target) = text.split_once(':').ok_or("expected NAME:/PATH or NAME:/PATH:ro")?;
    let (target, readonly) = match target.strip_suffix(":ro") {
        Some(target) => (target, true),
        None => (target.strip_suffix(":rw").unwrap_or(target), false),
    };
    Ok(AttachVolume { name: name.to_owned(), target: target.to_owned(), readonly })
}

fn parse_new_volume(text: &str) -> Result<NewVolume, String> {
    let parts: Vec<&str> = text.splitn(3, ':').collect();
    let [name, size, mount] = parts[..] else {
        return Err("expected NAME:MIB:/PATH".to_owned());
    };
    let size_mb = size.parse().map_err(|_| format!("`{size}` is not a number of MiB"))?;
    Ok(NewVolume { name: name.to_owned(), size_mb, mount: mount.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_and_file_arguments_are_parsed() {
        let volume = parse_volume("data:/srv/x:ro").unwrap();
        assert_eq!((&*volume.name, &*volume.target, volume.readonly), ("data", "/srv/x", true));
        let volume = parse_volume("data:/a:b").unwrap();
        assert_eq!((&*volume.target, volume.readonly), ("/a:b", false));
        let own = parse_new_volume("tmp:64:/scratch").unwrap();
        assert_eq!((&*own.name, own.size_mb, &*own.mount), ("tmp", 64, "/scratch"));
        assert!(parse_volume("data").is_err());
        assert!(parse_new_volume("tmp:x:/scratch").is_err() && parse_new_volume("tmp:1").is_err());
        assert_eq!(parse_file("a:b:/c"), Ok(("a:b".into(), "/c".to_owned())));
        assert!(parse_file("a").is_err());
    }
}
