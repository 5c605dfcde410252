//! `bhatti create`.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bhatti_api::{AttachVolume, CreateSandbox, Isolation, NewFile, NewVolume, Sandbox};
use bhatti_types::NEW_FILES_BYTES_MAX;
use clap::{Args, ValueEnum};
use tokio::time::Instant;

use super::Context;
use crate::cli::parse_variable;
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti create --name dev --cpus 2 --memory 1024 --env EDITOR=vi\n  bhatti create --volume data:/srv/data --file ./settings.json:/etc/app.json --label team=web"
)]
pub(crate) struct Create {
    /// Name of the sandbox [default: random]
    #[arg(long)]
    name: Option<String>,
    /// What to do if a sandbox has this name: fail, or return it unchanged [default: fail]
    #[arg(long, value_name = "fail|return", requires = "name")]
    if_exists: Option<IfExists>,
    /// The image that its disk begins as [default: minimal]
    #[arg(long)]
    image: Option<String>,
    /// The template that says what is left out here
    #[arg(long)]
    template: Option<String>,
    /// Its virtual CPUs [default: 1]
    #[arg(long, value_name = "COUNT")]
    cpus: Option<u64>,
    /// Its memory in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// The size of its root disk in MiB, with Docker where that can limit it [default: that of the image, 4096 for those built here]
    #[arg(long, value_name = "MIB")]
    disk: Option<u64>,
    /// A variable for its processes; may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// A secret that is a variable for its processes, too; may be given several times
    #[arg(long, value_name = "NAME")]
    secret: Vec<String>,
    /// A file of this machine to copy in before the init script runs, 16 MiB in total; may be given several times
    #[arg(long, value_name = "FILE:/PATH", value_parser = parse_file)]
    file: Vec<(PathBuf, String)>,
    /// A script that runs when it is up
    #[arg(long, value_name = "SCRIPT")]
    init: Option<String>,
    /// What is noted on it; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_variable)]
    label: Vec<(String, String)>,
    /// Seconds after which it is destroyed [default: never]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Keep it hot, however long nobody uses it
    #[arg(long)]
    keep_hot: bool,
    /// Boot it, rather than fork it from a template
    #[arg(long)]
    cold_boot: bool,
    /// How it is connected: nat or none [default: as this host can]
    #[arg(long, value_name = "MODE")]
    network: Option<String>,
    /// A private range that it may reach all the same; may be given several times
    #[arg(long, value_name = "CIDR")]
    allow_cidr: Vec<String>,
    /// A volume that it has, mounted there, read-only with `:ro`; may be given several times
    #[arg(long, value_name = "NAME:/PATH[:ro]", value_parser = parse_volume)]
    volume: Vec<AttachVolume>,
    /// A volume of its own, which ends with it; may be given several times
    #[arg(long, value_name = "NAME:MIB:/PATH", value_parser = parse_new_volume)]
    new_volume: Vec<NewVolume>,
}

/// What `--if-exists` does if the name is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IfExists {
    Fail,
    Return,
}

pub(super) async fn run(context: &Context, arguments: Create) -> Result<(), CliError> {
    check_sizes(&arguments.file)?;
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
        init: arguments.init,
        files: files.collect::<Result<_, _>>()?,
        secrets: arguments.secret,
        labels: arguments.label.into_iter().collect(),
        timeout_sec: arguments.timeout,
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
            "{made}; a container: it shares this host's kernel, and is isolated less than a VM"
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
                "the files have more than {} MiB together, with `{}`",
                NEW_FILES_BYTES_MAX >> 20,
                local.display()
            );
            return Err(CliError::new(message)
                .hint("copy large ones when the sandbox is there: bhatti file cp"));
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
    let size_mb = size.parse().map_err(|_| format!("`{size}` is no number of MiB"))?;
    Ok(NewVolume { name: name.to_owned(), size_mb, mount: mount.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_and_files_are_named_with_their_places() {
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
