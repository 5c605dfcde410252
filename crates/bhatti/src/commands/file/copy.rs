//! `bhatti cp`: files as they are, directories as tar archives.
//!
//! A copy to this machine is written beside its target and renamed, so that an interrupted copy
//! leaves nothing half finished. Only a directory that exists already is filled in place. Archives
//! come from guests, which are not trusted: nothing in an archive is unpacked outside of its
//! directory (see [`pack::unpack`]).

mod pack;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bhatti_client::{Client, Download, Upload};
use tokio::io::AsyncWriteExt;
use tokio_util::io::SyncIoBridge;

pub(in crate::commands) use pack::pack;

use super::super::Context;
use crate::error::CliError;
use crate::output::{Output, Transfer};

/// Size of the buffer between an archive's reader and writer, in bytes.
const PIPE_BYTES: usize = 256 * 1024;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Here(PathBuf),
    There { sandbox: String, path: String },
}

impl Side {
    /// Parses `SANDBOX:PATH`, or a path of this machine, which may have a colon after a slash.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((sandbox, path)) if !sandbox.is_empty() && !sandbox.contains('/') => {
                Self::There { sandbox: sandbox.to_owned(), path: path.to_owned() }
            }
            _ => Self::Here(text.into()),
        }
    }
}

pub(super) async fn run(context: &Context, from: &str, to: &str) -> Result<(), CliError> {
    match (Side::parse(from), Side::parse(to)) {
        (Side::Here(local), Side::There { sandbox, path }) => {
            let there = There::find(context, &sandbox, path).await?;
            there.receive(context, &local).await?;
        }
        (Side::There { sandbox, path }, Side::Here(local)) => {
            let there = There::find(context, &sandbox, path).await?;
            there.send(context, &local).await?;
        }
        (Side::Here(_), Side::Here(_)) => {
            return Err(CliError::new("neither side is in a sandbox")
                .hint("name one as SANDBOX:PATH: bhatti cp ./project dev:/workspace"));
        }
        (Side::There { .. }, Side::There { .. }) => {
            return Err(CliError::new("both sides are in sandboxes")
                .hint("copy to this machine first, and from there to the other"));
        }
    }
    context.output.done("path", to, &format!("copied {from} to"))
}

/// A path in a sandbox.
struct There {
    sandbox: String,
    path: String,
}

impl There {
    async fn find(context: &Context, typed: &str, path: String) -> Result<Self, CliError> {
        if !path.starts_with('/') {
            return Err(CliError::new(format!("`{path}` is not an absolute path"))
                .hint("paths in sandboxes begin with a slash: dev:/workspace"));
        }
        let found = context.change(typed, async |id| context.client.inspect(id).await).await?;
        Ok(Self { sandbox: found.id, path })
    }

    /// Returns the path, or the path of the entry `name` in it if it is a directory.
    async fn target(&self, client: &Client, name: &str) -> String {
        let is_directory = match client.stat(&self.sandbox, &self.path).await {
            Ok(stat) => stat.is_dir,
            // Usually nothing exists there yet. The copy itself reports any other error.
            Err(_) => self.path.ends_with('/'),
        };
        let directory = self.path.trim_end_matches('/');
        if is_directory { format!("{directory}/{name}") } else { self.path.clone() }
    }

    /// Copies from this machine into the sandbox.
    async fn receive(&self, context: &Context, local: &Path) -> Result<(), CliError> {
        let failed =
            |error| CliError::new(format!("failed to read `{}`: {error}", local.display()));
        let facts = fs::metadata(local).map_err(failed)?;
        let full = fs::canonicalize(local).map_err(failed)?;
        let name = full.file_name().map(|name| name.to_string_lossy().into_owned());
        let target = self.target(&context.client, &name.unwrap_or_default()).await;
        if facts.is_dir() {
            return self.receive_directory(context, local, &target).await;
        }
        let file = tokio::fs::File::open(local).await.map_err(failed)?;
        let length = facts.is_file().then_some(facts.len());
        let transfer = Transfer::begin(context.output, "copying", length);
        let content = Upload::new(transfer.counting(file), length);
        let mode = format!("{:04o}", facts.permissions().mode() & 0o7777);
        context.client.write_file(&self.sandbox, &target, Some(&mode), content).await?;
        Ok(())
    }

    async fn receive_directory(
        &self,
        context: &Context,
        local: &Path,
        target: &str,
    ) -> Result<(), CliError> {
        let (writer, reader) = tokio::io::duplex(PIPE_BYTES);
        let directory = local.to_owned();
        let packing = tokio::task::spawn_blocking(move || {
            pack(&directory, SyncIoBridge::new(writer), |_, _| true)
        });
        let transfer = Transfer::begin(context.output, "copying", None);
        let archive = Upload::new(transfer.counting(reader), None);
        let sent = context.client.write_tar(&self.sandbox, target, archive).await;
        let packed = packing.await.map_err(io::Error::other)?;
        // A file that cannot be read cuts the archive short, and the daemon complains about the
        // archive.
        match packed {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(CliError::new(format!("failed to read `{}`: {error}", local.display())))
            }
            packed => {
                let left_out = packed.unwrap_or_default();
                note_skipped(context.output, left_out.iter().chain(&sent?.skipped));
                Ok(())
            }
        }
    }

    /// Copies from the sandbox to this machine.
    async fn send(&self, context: &Context, local: &Path) -> Result<(), CliError> {
        let client = &context.client;
        let stat = client.stat(&self.sandbox, &self.path).await?;
        let name = self.path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let target = match (local.is_dir(), name) {
            (true, "" | "." | "..") | (false, _) => local.to_owned(),
            (true, name) => local.join(name),
        };
        if stat.is_dir {
            let archive = client.read_tar(&self.sandbox, &self.path).await?;
            let transfer = Transfer::begin(context.output, "copying", None);
            let skipped = unpack(archive, &target, &transfer).await?;
            note_skipped(context.output, &skipped);
            return Ok(());
        }
        let content = client.read_file(&self.sandbox, &self.path).await?;
        let transfer = Transfer::begin(context.output, "copying", content.size());
        let mode = u32::from_str_radix(&stat.mode, 8).unwrap_or(0o644) & 0o777;
        write_file(content, &target, mode, &transfer).await
    }
}

/// Prints which entries the copy left out.
fn note_skipped<'a>(output: Output, skipped: impl IntoIterator<Item = &'a String>) {
    for path in skipped {
        output.tell(&format!("skipped `{path}`: not a file, directory or link"));
    }
}

/// Returns the directory and the name prefix of a temporary file beside the target.
fn beside(target: &Path) -> Result<(PathBuf, String), CliError> {
    let full = std::path::absolute(target)?;
    let name = full.file_name().ok_or_else(|| {
        CliError::new(format!("`{}` cannot be the target of a copy", target.display()))
    })?;
    let prefix = format!(".{}.", name.to_string_lossy());
    Ok((full.parent().unwrap_or(Path::new("/")).to_owned(), prefix))
}

fn cannot_write(target: &Path) -> impl Fn(io::Error) -> CliError + '_ {
    // The path of the temporary file in the error means nothing to the user.
    move |error| {
        let error = error.raw_os_error().map_or(error, io::Error::from_raw_os_error);
        CliError::new(format!("failed to write `{}`: {error}", target.display()))
    }
}

pub(in crate::commands) async fn write_file(
    mut content: Download,
    target: &Path,
    mode: u32,
    transfer: &Transfer,
) -> Result<(), CliError> {
    let (directory, prefix) = beside(target)?;
    let part = tempfile::Builder::new().prefix(&prefix).tempfile_in(directory);
    let (file, path) = part.map_err(cannot_write(target))?.into_parts();
    let mut file = tokio::fs::File::from_std(file);
    while let Some(bytes) = content.next().await? {
        transfer.add(bytes.len());
        file.write_all(&bytes).await.map_err(cannot_write(target))?;
    }
    file.flush().await.map_err(cannot_write(target))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(cannot_write(target))?;
    path.persist(target).map_err(|error| cannot_write(target)(error.error))
}

/// Unpacks an archive, and returns the names of the entries that were left out.
async fn unpack(
    archive: Download,
    target: &Path,
    transfer: &Transfer,
) -> Result<Vec<String>, CliError> {
    if target.is_dir() {
        return unpack_into(archive, target, transfer).await;
    }
    let (directory, prefix) = beside(target)?;
    let part = tempfile::Builder::new().prefix(&prefix).tempdir_in(directory);
    let part = part.map_err(cannot_write(target))?;
    let whole = part.path().join("whole");
    fs::create_dir(&whole).map_err(cannot_write(target))?;
    let skipped = unpack_into(archive, &whole, transfer).await?;
    fs::rename(&whole, target).map_err(cannot_write(target))?;
    Ok(skipped)
}

async fn unpack_into(
    mut archive: Download,
    directory: &Path,
    transfer: &Transfer,
) -> Result<Vec<String>, CliError> {
    let (mut writer, reader) = tokio::io::duplex(PIPE_BYTES);
    let place = directory.to_owned();
    let unpacking =
        tokio::task::spawn_blocking(move || pack::unpack(SyncIoBridge::new(reader), &place));
    let mut received = Ok(());
    loop {
        match archive.next().await {
            Ok(Some(bytes)) => {
                transfer.add(bytes.len());
                if writer.write_all(&bytes).await.is_err() {
                    // The unpacking has ended, and its result has the error.
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                received = Err(error);
                break;
            }
        }
    }
    drop(writer);
    let unpacked = unpacking.await.map_err(io::Error::other)?;
    received?;
    let mut skipped = unpacked.map_err(cannot_write(directory))?;
    skipped.extend_from_slice(archive.skipped());
    Ok(skipped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_and_sandbox_paths_are_distinguished() {
        let there = |sandbox: &str, path: &str| Side::There {
            sandbox: sandbox.to_owned(),
            path: path.to_owned(),
        };
        assert_eq!(Side::parse("dev:/a:b"), there("dev", "/a:b"));
        assert_eq!(Side::parse("dev:"), there("dev", ""));
        for local in ["a", "./a:b", "/x:y", ":a"] {
            assert_eq!(Side::parse(local), Side::Here(local.into()));
        }
    }
}
