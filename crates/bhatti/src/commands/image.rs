//! `bhatti image`.

use std::path::{Path, PathBuf};

use bhatti_api::Image as Listed;
use bhatti_client::Upload;
use clap::Subcommand;
use tokio::io::AsyncWriteExt;

use super::file::write_file;
use super::image_build::{self, Build};
use super::image_login::{self, Login};
use super::image_pull::{self, Pull, Push};
use super::{Context, several};
use crate::error::CliError;
use crate::output::{Cell, Table, Transfer, bytes, mib};

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// List images
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti image list")]
    List,
    /// Show one image
    #[command(after_help = "Example:\n  bhatti image inspect minimal")]
    Inspect {
        /// Name of the image
        image: String,
    },
    /// Build an image from a Dockerfile, in a sandbox
    #[command(
        after_help = "Examples:\n  bhatti image build -t web .\n  bhatti image build -t web --build-arg VERSION=2 --secret id=token,src=token.txt .\n  bhatti image build -t node --package nodejs --package npm\n\nA build runs in a sandbox of its own; `bhatti setup --builder` makes what it needs.\nIts results are kept in your volume `build-cache`, so that the next build runs changed steps only.\nThe daemon pulls the images that the Dockerfile names. Files that .dockerignore names are not sent.\nCtrl+C cancels the build."
    )]
    Build(Build),
    /// Pull an image from a registry onto the daemon's machine
    #[command(
        after_help = "Example:\n  bhatti image pull python:3.12-slim\n  bhatti create --image python:3.12-slim\n\nThe command uses `bhatti image login`, or what `docker login` has saved. Ctrl+C cancels the pull; the next one continues it. The key\n`registries` of the daemon's config.yaml has the settings of registries: plain HTTP, private addresses, mirrors."
    )]
    Pull(Pull),
    /// Save a sandbox's files as an image; the sandbox may run or be stopped
    #[command(
        after_help = "Example:\n  bhatti image save dev tools\n  bhatti create --image tools\n\nProcesses and memory are not saved: see `bhatti snapshot create`. What processes write meanwhile may be missing."
    )]
    Save {
        /// Sandbox to save
        sandbox: String,
        /// Name of the image
        name: String,
    },
    /// Push an image to a registry
    #[command(
        after_help = "Example:\n  bhatti image push web registry.example.com/team/web:1\n\nThe command uses `bhatti image login`, or what `docker login` has saved. Layers that the registry has already are not sent."
    )]
    Push(Push),
    /// Write an image into an archive that Docker, Podman and skopeo read
    #[command(
        after_help = "Examples:\n  bhatti image export web -o web.tar\n  bhatti image export web -o - | docker load\n\nThe archive is an OCI layout with Docker's own description."
    )]
    Export {
        /// Image to write
        image: String,
        /// File to write, or `-` for standard output
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Log in at a registry, for pulls, pushes and builds
    #[command(
        after_help = "Examples:\n  bhatti image login -u alice\n  bhatti image login registry.example.com:5000 -u alice < password.txt\n\nThe password or token is read from standard input or a prompt. The registry checks it; then the\ndaemon keeps it, encrypted. Without a login there, pulls and pushes use what `docker login` has\nsaved on this machine."
    )]
    Login(Login),
    /// List your logins at registries, without their passwords
    #[command(after_help = "Example:\n  bhatti image logins")]
    Logins,
    /// Forget a login at a registry
    #[command(after_help = "Example:\n  bhatti image logout registry.example.com:5000")]
    Logout {
        /// Registry, HOST or HOST:PORT
        #[arg(default_value = "docker.io")]
        registry: String,
    },
    /// Give an image another name
    #[command(
        after_help = "Example:\n  bhatti image tag python:3.12-slim py\n  bhatti create --image py"
    )]
    Tag {
        /// Image to name
        image: String,
        /// New name
        name: String,
    },
    /// Delete all of your images that no sandbox, snapshot or template uses
    #[command(after_help = "Example:\n  bhatti image prune --yes")]
    Prune {
        /// Do not ask for confirmation
        #[arg(short, long)]
        yes: bool,
    },
    /// Let another user create sandboxes from an image of yours
    #[command(
        after_help = "Example:\n  bhatti image share web bob\n\nFor the other user, the image has the name IMAGE@OWNER: bhatti create --image web@alice"
    )]
    Share {
        /// Image of yours
        image: String,
        /// Name of the other user
        user: String,
    },
    /// End that another user can create sandboxes from an image of yours
    #[command(after_help = "Example:\n  bhatti image unshare web bob")]
    Unshare {
        /// Image of yours
        image: String,
        /// Name of the other user
        user: String,
    },
    /// Import an image from a tar archive: a root file system, `docker save` output, or an OCI
    /// layout
    #[command(
        after_help = "Example:\n  docker export CONTAINER > root.tar\n  bhatti image import web root.tar\n\nThe archive is a tar of a root file system, the output of `docker save` for one image, or an OCI layout. It may be\ncompressed with gzip, xz or zstd. `-` reads it from standard input."
    )]
    Import {
        /// Name of the image
        name: String,
        /// Archive, or `-` for standard input
        archive: PathBuf,
    },
    /// Delete images that no sandbox, snapshot or template uses
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti image delete web")]
    Delete {
        /// Names of the images
        #[arg(required = true)]
        images: Vec<String>,
    },
}

const IMAGES: Table<Listed> = Table {
    header: &["NAME", "OWNER", "SIZE", "ON DISK", "SOURCE"],
    row: |image| {
        let source: String = image.source.chars().take(40).collect();
        vec![
            image.name.clone().into(),
            image.owner.clone().into(),
            mib(image.size_mb).into(),
            bytes(image.disk_bytes).into(),
            source.into(),
        ]
    },
    key: |image| image.name.clone(),
};

pub(crate) async fn run(context: &Context, command: Image) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    match command {
        Image::List => output.show_list(&client.list_images().await?, &IMAGES),
        Image::Inspect { image } => {
            output.show_facts(&client.inspect_image(&image).await?, describe)
        }
        Image::Login(arguments) => image_login::log_in(context, arguments).await,
        Image::Logins => image_login::list(context).await,
        Image::Logout { registry } => image_login::log_out(context, &registry).await,
        Image::Build(arguments) => image_build::run(context, arguments).await,
        Image::Pull(arguments) => image_pull::pull(context, arguments).await,
        Image::Save { sandbox, name } => image_pull::save(context, sandbox, name).await,
        Image::Push(arguments) => image_pull::push(context, arguments).await,
        Image::Export { image, output } => export(context, &image, &output).await,
        Image::Tag { image, name } => {
            let tagged = client.tag_image(&image, &name).await?;
            output.show(&tagged, |tagged| format!("{} is now {image}", tagged.name))
        }
        Image::Prune { yes } => prune(context, yes).await,
        Image::Share { image, user } => {
            let shared = client.share_image(&image, &user).await?;
            output.show(&shared, |shared| format!("{user} can use {}", shared.name))
        }
        Image::Unshare { image, user } => {
            let shared = client.unshare_image(&image, &user).await?;
            output.show(&shared, |shared| format!("{user} can no longer use {}", shared.name))
        }
        Image::Import { name, archive } => {
            let (content, length) = open(&archive).await?;
            let transfer = Transfer::begin(output, "importing", length);
            let archive = Upload::new(transfer.counting(content), length);
            let image = client.import_image(&name, archive).await?;
            drop(transfer);
            output.show(&image, |image| {
                format!("imported {} ({} on disk)", image.name, bytes(image.disk_bytes))
            })
        }
        Image::Delete { images } => {
            several::delete(context, "image", &images, async |image| {
                client.delete_image(image).await
            })
            .await
        }
    }
}

type Content = Box<dyn tokio::io::AsyncRead + Send + Unpin>;

async fn open(archive: &PathBuf) -> Result<(Content, Option<u64>), CliError> {
    if archive.as_os_str() == "-" {
        return Ok((Box::new(tokio::io::stdin()), None));
    }
    let failed = |error| CliError::new(format!("failed to read `{}`: {error}", archive.display()));
    let file = tokio::fs::File::open(archive).await.map_err(failed)?;
    let facts = file.metadata().await.map_err(failed)?;
    let length = facts.is_file().then_some(facts.len());
    Ok((Box::new(file), length))
}

async fn export(context: &Context, image: &str, target: &Path) -> Result<(), CliError> {
    let mut content = context.client.export_image(image).await?;
    if target.as_os_str() == "-" {
        let mut stdout = tokio::io::stdout();
        while let Some(bytes) = content.next().await? {
            stdout.write_all(&bytes).await?;
        }
        return Ok(stdout.flush().await?);
    }
    let transfer = Transfer::begin(context.output, "exporting", None);
    write_file(content, target, 0o644, &transfer).await?;
    drop(transfer);
    let done = serde_json::json!({ "image": image, "file": target });
    context.output.show(&done, |_| format!("exported {image} to {}", target.display()))
}

async fn prune(context: &Context, yes: bool) -> Result<(), CliError> {
    several::confirm(yes, "delete all of your images that no sandbox, snapshot or template uses")?;
    let pruned = context.client.prune_images().await?;
    context.output.show(&pruned, |pruned| {
        let freed = bytes(pruned.freed_bytes);
        match pruned.deleted.len() {
            0 => "no image is unused".to_owned(),
            1 => format!("deleted {} and freed {freed}", pruned.deleted[0]),
            count => format!("deleted {count} images and freed {freed}"),
        }
    })
}

fn describe(image: &Listed) -> Vec<(&'static str, Cell)> {
    let mut facts = vec![
        ("name", Cell::from(&image.name)),
        ("default", if image.is_default { "yes" } else { "no" }.into()),
        ("owner", Cell::from(&image.owner)),
        ("size", mib(image.size_mb).into()),
        ("on disk", bytes(image.disk_bytes).into()),
        ("source", Cell::from(&image.source)),
    ];
    let settings = image.config.clone().unwrap_or_default();
    let env = settings.env.iter().map(|(name, value)| format!("{name}={value}"));
    let texts = [
        ("created", image.created_at.clone().unwrap_or_default()),
        ("last used", image.used_at.clone().unwrap_or_default()),
        ("shared with", image.shared_with.join(", ")),
        ("user", settings.user),
        ("directory", settings.workdir),
        ("entrypoint", settings.entrypoint.join(" ")),
        ("command", settings.cmd.join(" ")),
        ("environment", env.collect::<Vec<_>>().join(", ")),
        ("ports", settings.exposed_ports.join(", ")),
        ("stop signal", settings.stop_signal),
    ];
    facts.extend(
        texts
            .into_iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(name, text)| (name, Cell::from(text))),
    );
    facts
}
