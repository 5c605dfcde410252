//! `bhatti file`.

mod copy;

use std::io::{self, Write};

use bhatti_api::{FileEntry, MakeDirectory, RenameFile};
use bhatti_client::Upload;
use clap::{Args, Subcommand};

use super::Context;
use crate::error::CliError;
use crate::output::{Cell, Table, Transfer, unix_time};

pub(super) use copy::{pack, write_file};

#[derive(Debug, Args)]
pub(crate) struct File {
    /// User to act as: a name, a number, or UID:GID [default: the sandbox's usual user]
    #[arg(short, long, global = true)]
    user: Option<String>,
    #[command(subcommand)]
    command: FileCommand,
}

#[derive(Debug, Subcommand)]
enum FileCommand {
    /// Print a file
    #[command(after_help = "Example:\n  bhatti file read dev /etc/hostname")]
    Read {
        /// Name, id, or a prefix of the id of six digits or more
        sandbox: String,
        /// The file
        path: String,
    },
    /// Write a file from standard input, atomically
    #[command(
        after_help = "Example:\n  bhatti file write dev /workspace/notes --mode 0600 < notes"
    )]
    Write {
        /// Name or id
        sandbox: String,
        /// The file
        path: String,
        /// Permission bits in octal [default: those of the existing file, or 0644]
        #[arg(long, value_name = "MODE")]
        mode: Option<String>,
    },
    /// List a directory
    #[command(after_help = "Example:\n  bhatti file ls dev /workspace")]
    Ls {
        /// Name, id, or a prefix of the id of six digits or more
        sandbox: String,
        /// The directory
        #[arg(default_value = "/workspace")]
        path: String,
    },
    /// Show a file's size, permissions and kind
    #[command(after_help = "Example:\n  bhatti file stat dev /etc/hostname")]
    Stat {
        /// Name, id, or a prefix of the id of six digits or more
        sandbox: String,
        /// The file
        path: String,
    },
    /// Remove files
    #[command(after_help = "Example:\n  bhatti file rm dev --recursive /workspace/old")]
    Rm {
        /// Name or id
        sandbox: String,
        /// The files
        #[arg(required = true)]
        paths: Vec<String>,
        /// Remove directories and their content, too
        #[arg(short, long)]
        recursive: bool,
    },
    /// Create directories
    #[command(after_help = "Example:\n  bhatti file mkdir dev --parents /workspace/a/b")]
    Mkdir {
        /// Name or id
        sandbox: String,
        /// The directories
        #[arg(required = true)]
        paths: Vec<String>,
        /// Create missing parents, and accept directories that exist
        #[arg(short, long)]
        parents: bool,
        /// Permission bits in octal [default: 0755]
        #[arg(long, value_name = "MODE")]
        mode: Option<String>,
    },
    /// Print changes of a file, or of a directory's own entries, as they happen
    #[command(after_help = "Example:\n  bhatti file watch dev /workspace")]
    Watch {
        /// Name, id, or a prefix of the id of six digits or more
        sandbox: String,
        /// File or directory
        #[arg(default_value = "/workspace")]
        path: String,
    },
    /// Rename a file or directory
    #[command(after_help = "Example:\n  bhatti file mv dev /workspace/a /workspace/b")]
    Mv {
        /// Name or id
        sandbox: String,
        /// Current path
        from: String,
        /// New path
        to: String,
    },
    /// Copy files and directories into a sandbox, or out of it: see `bhatti cp`
    #[command(hide = true, after_help = "Example:\n  bhatti file cp ./project dev:/workspace")]
    Cp(Paths),
}

/// Options and paths of `bhatti cp`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti cp ./project dev:/workspace\n  bhatti cp dev:/workspace/result.txt .\n\nIf the target is an existing directory, the source is copied into it under its own name."
)]
pub(crate) struct Cp {
    /// User to act as: a name, a number, or UID:GID [default: the sandbox's usual user]
    #[arg(short, long)]
    user: Option<String>,
    #[command(flatten)]
    paths: Paths,
}

/// Source and target of a copy.
#[derive(Debug, Args)]
pub(crate) struct Paths {
    /// Source: PATH or SANDBOX:PATH
    from: String,
    /// Target: PATH or SANDBOX:PATH
    to: String,
}

const ENTRIES: Table<FileEntry> = Table {
    header: &["MODE", "SIZE", "CHANGED", "NAME"],
    row: |entry| {
        let kind = match (&entry.symlink_target, entry.is_dir) {
            (Some(_), _) => 'l',
            (None, true) => 'd',
            (None, false) => '-',
        };
        let target = entry.symlink_target.iter().map(|target| format!(" -> {target}"));
        vec![
            format!("{kind}{}", entry.mode).into(),
            entry.size.to_string().into(),
            Cell::Time(unix_time(entry.mtime)),
            (entry.name.clone() + &target.collect::<String>()).into(),
        ]
    },
    key: |entry| entry.name.clone(),
};

pub(crate) async fn run(context: &Context, arguments: File) -> Result<(), CliError> {
    let context = &context.acting_as(arguments.user.as_deref());
    let (client, output) = (&context.client, context.output);
    match arguments.command {
        FileCommand::Read { sandbox, path } => read(context, &sandbox, &path).await,
        FileCommand::Write { sandbox, path, mode } => write(context, &sandbox, &path, mode).await,
        FileCommand::Ls { sandbox, path } => {
            let list = async |id: &str| client.list_directory(id, &path).await;
            output.show_list(&context.read(&sandbox, list).await?, &ENTRIES)
        }
        FileCommand::Stat { sandbox, path } => stat(context, &sandbox, &path).await,
        FileCommand::Rm { sandbox, paths, recursive } => {
            for path in paths {
                let remove = async |id: &str| client.remove_file(id, &path, recursive).await;
                context.change(&sandbox, remove).await?;
                output.done("path", &path, "removed")?;
            }
            Ok(())
        }
        FileCommand::Mkdir { sandbox, paths, parents, mode } => {
            for path in paths {
                let request = MakeDirectory { path, mode: mode.clone(), parents, user: None };
                context
                    .change(&sandbox, async |id| client.make_directory(id, &request).await)
                    .await?;
                output.done("path", &request.path, "made")?;
            }
            Ok(())
        }
        FileCommand::Watch { sandbox, path } => watch(context, &sandbox, &path).await,
        FileCommand::Mv { sandbox, from, to } => {
            let request = RenameFile { from, to, user: None };
            context.change(&sandbox, async |id| client.rename_file(id, &request).await).await?;
            output.done("path", &request.to, "moved to")
        }
        FileCommand::Cp(Paths { from, to }) => copy::run(context, &from, &to).await,
    }
}

/// Runs `bhatti cp`.
pub(crate) async fn copy_paths(context: &Context, arguments: Cp) -> Result<(), CliError> {
    let Cp { user, paths: Paths { from, to } } = arguments;
    copy::run(&context.acting_as(user.as_deref()), &from, &to).await
}

async fn read(context: &Context, sandbox: &str, path: &str) -> Result<(), CliError> {
    let read = async |id: &str| context.client.read_file(id, path).await;
    let mut content = context.read(sandbox, read).await?;
    let mut stdout = io::stdout();
    while let Some(bytes) = content.next().await? {
        stdout.write_all(&bytes)?;
    }
    Ok(stdout.flush()?)
}

async fn watch(context: &Context, sandbox: &str, path: &str) -> Result<(), CliError> {
    let watch = async |id: &str| context.client.watch(id, path).await;
    let mut changes = context.read(sandbox, watch).await?;
    while let Some(change) = changes.next().await? {
        context.output.show(&change, |change| {
            let name = change.name.as_deref().unwrap_or(path);
            format!("{}\t{name}", change.kind.as_str())
        })?;
    }
    Ok(())
}

async fn write(
    context: &Context,
    sandbox: &str,
    path: &str,
    mode: Option<String>,
) -> Result<(), CliError> {
    let client = &context.client;
    // Standard input can be read only once, so the sandbox is looked up first.
    let sandbox = context.change(sandbox, async |id| client.inspect(id).await).await?;
    let transfer = Transfer::begin(context.output, "writing", None);
    let content = Upload::new(transfer.counting(tokio::io::stdin()), None);
    client.write_file(&sandbox.id, path, mode.as_deref(), content).await?;
    drop(transfer);
    context.output.done("path", path, "wrote")
}

async fn stat(context: &Context, sandbox: &str, path: &str) -> Result<(), CliError> {
    let stat = async |id: &str| context.client.stat(id, path).await;
    let stat = context.read(sandbox, stat).await?;
    let shown = serde_json::json!({
        "path": path, "size": stat.size, "mode": stat.mode, "is_dir": stat.is_dir,
    });
    context.output.show_facts(&shown, |_| {
        let kind = if stat.is_dir { "directory" } else { "file" };
        vec![
            ("path", path.into()),
            ("kind", kind.into()),
            ("mode", stat.mode.as_str().into()),
            ("size", format!("{} bytes", stat.size).into()),
        ]
    })
}
