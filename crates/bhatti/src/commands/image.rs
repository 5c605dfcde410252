//! `bhatti image`.

use std::path::PathBuf;

use bhatti_api::Image as Listed;
use bhatti_client::Upload;
use bhatti_image::{ImageStore, build_image};
use bhatti_types::ImageName;
use clap::Subcommand;

use super::image_pull::{self, Pull};
use super::setup::progress::with_progress;
use super::{Context, several};
use crate::error::CliError;
use crate::output::{Cell, Table, Transfer, bytes, mib};
use crate::paths;

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
    /// Build an image on the daemon's machine: `minimal` with more Debian packages
    #[command(
        after_help = "Example:\n  bhatti image build node --package nodejs --package npm\n  bhatti create --image node"
    )]
    Build {
        /// Name of the image
        name: String,
        /// Debian package to install (repeatable)
        #[arg(short, long, value_name = "PACKAGE", required = true)]
        package: Vec<String>,
    },
    /// Pull an image from a registry, on the daemon's machine
    #[command(
        after_help = "Example:\n  bhatti image pull python:3.12-slim\n  bhatti create --image python:3.12-slim\n\nThe command uses what `docker login` has saved. The key `registries` of config.yaml has the settings of\nregistries: plain HTTP, private addresses, mirrors."
    )]
    Pull(Pull),
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
    header: &["NAME", "DEFAULT", "SIZE", "ON DISK", "SOURCE"],
    row: |image| {
        let source: String = image.source.chars().take(40).collect();
        vec![
            image.name.clone().into(),
            if image.is_default { "yes" } else { "no" }.into(),
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
        Image::Build { name, package } => build(context, &name, &package).await,
        Image::Pull(arguments) => image_pull::pull(context, arguments).await,
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

async fn build(context: &Context, name: &str, packages: &[String]) -> Result<(), CliError> {
    let name: ImageName = name.parse().map_err(|error| CliError::of(&error))?;
    paths::create_data_dir(&context.data_dir)?;
    let store = ImageStore::new(&context.data_dir);
    let built = with_progress(context.output, async |progress| {
        build_image(&store, &name, packages, progress).await
    });
    built.await.map_err(|error| CliError::of(&error))?;
    context.output.show(&serde_json::json!({ "image": name.as_str() }), |_| {
        format!("ready: bhatti create --image {name}")
    })
}

fn describe(image: &Listed) -> Vec<(&'static str, Cell)> {
    vec![
        ("name", Cell::from(&image.name)),
        ("default", if image.is_default { "yes" } else { "no" }.into()),
        ("size", mib(image.size_mb).into()),
        ("on disk", bytes(image.disk_bytes).into()),
        ("source", Cell::from(&image.source)),
    ]
}
