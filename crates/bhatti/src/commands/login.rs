//! `bhatti login` and `bhatti context`: remote daemons and their keys.

use bhatti_api::ErrorCode;
use bhatti_client::{Client, ClientError, Endpoint};
use clap::{Args, Subcommand};
use serde_json::json;

use super::{Context, hidden};
use crate::error::CliError;
use crate::output::{Cell, Table};
use crate::saved::{self, LOCAL, SavedContext};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti login https://box.example.com:8443\n  bhatti login https://box.example.com:8443 --name box < key.txt\n\nThe API key is read from standard input or a prompt, so that it is in no history. The daemon checks it; then both are saved in ~/.bhatti/config.yaml, readable by its owner alone."
)]
pub(crate) struct Login {
    /// URL of the daemon, https://HOST:PORT
    #[arg(value_name = "URL")]
    address: String,
    /// Name of the context [default: the URL's host, and its port if it is not the usual one]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Send the key over plain HTTP to another machine, where others may read it
    #[arg(long)]
    insecure: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List the daemons that `bhatti login` saved, and the local one
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti context list")]
    List,
    /// Call this daemon from now on
    #[command(after_help = "Examples:\n  bhatti context use box\n  bhatti context use local")]
    Use {
        /// Name of the context; `local` for the daemon on this machine
        name: String,
    },
    /// Forget a daemon and its key
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti context delete box")]
    Delete {
        /// Name of the context
        name: String,
    },
}

/// A context as it is listed.
#[derive(serde::Serialize)]
struct Listed {
    name: String,
    url: Option<String>,
    current: bool,
}

const CONTEXTS: Table<Listed> = Table {
    header: &["CURRENT", "NAME", "URL"],
    row: |context| {
        let url = context.url.clone().unwrap_or_else(|| "the daemon on this machine".to_owned());
        let current = if context.current { "*" } else { "" };
        vec![current.into(), context.name.clone().into(), Cell::from(url)]
    },
    key: |context| context.name.clone(),
};

pub(crate) async fn login(context: &Context, arguments: Login) -> Result<(), CliError> {
    let Login { address: url, name, insecure } = arguments;
    let endpoint: Endpoint = url.parse().map_err(|error| CliError::of(&error))?;
    let Endpoint::Tcp { host, .. } = &endpoint else { return Err(CliError::new("not a URL")) };
    if !endpoint.is_private() && !insecure {
        return Err(CliError::new(format!(
            "refused to send the API key to {host} over plain HTTP, where others may read it"
        ))
        .hint("use https://, or --insecure on a network that you trust"));
    }
    let name = name.unwrap_or_else(|| usual_name(&url));
    check_name(&name)?;
    let key = hidden::read("API key")?;
    if key.trim().is_empty() {
        return Err(CliError::new("the API key is empty")
            .hint("pass it in: bhatti login URL < FILE; `bhatti user create` prints a key"));
    }
    remember(context, &name, &url, key.trim()).await
}

/// Returns the name of a context for a daemon: the URL's host and port.
pub(super) fn usual_name(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest).to_owned()
}

fn check_name(name: &str) -> Result<(), CliError> {
    if name != LOCAL {
        return Ok(());
    }
    Err(CliError::new("`local` is the daemon on this machine")
        .hint("choose another name with --name"))
}

/// Saves a daemon's URL and key after the daemon has accepted the key, and calls it from now on.
pub(super) async fn remember(
    context: &Context,
    name: &str,
    url: &str,
    key: &str,
) -> Result<(), CliError> {
    check_name(name)?;
    let client = Client::http(url, key).map_err(|error| CliError::of(&error))?;
    let sandboxes = client.list().await.map_err(|error| {
        let refused =
            matches!(&error, ClientError::Refused(body) if body.code == ErrorCode::Unauthorized);
        let error = CliError::from(error);
        if refused {
            error.hint("the daemon does not know this key; nothing was saved")
        } else {
            error
        }
    })?;
    let saved = SavedContext { url: url.to_owned(), key: key.to_owned() };
    let path = saved::add(name, saved)?;
    let shown = json!({ "context": name, "url": url, "saved": path.display().to_string() });
    context.output.show(&shown, |_| {
        format!(
            "{url} accepts the key ({} sandboxes); saved as `{name}` in {}",
            sandboxes.len(),
            path.display()
        )
    })
}

pub(crate) fn run(context: &Context, command: ContextCommand) -> Result<(), CliError> {
    match command {
        ContextCommand::List => {
            let (contexts, current) = saved::contexts()?;
            let mut all =
                vec![Listed { name: LOCAL.to_owned(), url: None, current: current.is_none() }];
            all.extend(contexts.into_iter().map(|(name, saved)| Listed {
                current: current.as_ref() == Some(&name),
                url: Some(saved.url),
                name,
            }));
            context.output.show_list(&all, &CONTEXTS)
        }
        ContextCommand::Use { name } => {
            saved::choose_context(&name)?;
            context.output.done("context", &name, "using")
        }
        ContextCommand::Delete { name } => {
            saved::remove(&name)?;
            context.output.done("context", &name, "deleted")
        }
    }
}
