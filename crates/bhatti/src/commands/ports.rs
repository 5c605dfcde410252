//! `bhatti ports`.

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;

use super::Context;
use crate::error::CliError;
use crate::output::{Cell, Table};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti ports dev\n  bhatti ports")]
pub(crate) struct Ports {
    /// Name, id, or a prefix of the id of six digits or more [default: all hot sandboxes]
    sandbox: Option<String>,
}

/// A port of a sandbox.
#[derive(Debug, Serialize)]
struct Port {
    sandbox: String,
    port: u16,
    /// Whether a process listens on the port right now.
    listening: bool,
    /// The public URLs of the port, if it is published.
    urls: Vec<String>,
}

const PORTS: Table<Port> = Table {
    header: &["SANDBOX", "PORT", "LISTENING", "PUBLISHED AT"],
    row: |port| {
        vec![
            port.sandbox.clone().into(),
            Cell::number(port.port.into()),
            if port.listening { "yes" } else { "no" }.into(),
            port.urls.first().map_or("-", String::as_str).into(),
        ]
    },
    key: |port| port.port.to_string(),
};

pub(crate) async fn run(context: &Context, arguments: &Ports) -> Result<(), CliError> {
    let ports = match &arguments.sandbox {
        Some(sandbox) => of_one(context, sandbox).await?,
        None => of_all(context).await?,
    };
    context.output.show_list(&ports, &PORTS)
}

/// Returns the ports that a sandbox listens on, and its published ports.
async fn of_one(context: &Context, typed: &str) -> Result<Vec<Port>, CliError> {
    let client = &context.client;
    let sandbox = context.read(typed, async |id| client.inspect(id).await).await?;
    let mut ports = BTreeMap::new();
    for port in client.list_ports(&sandbox.id).await? {
        ports.insert(port.container_port, (true, Vec::new()));
    }
    for published in client.list_published(&sandbox.id).await? {
        let alias = || vec![published.alias.clone()];
        let urls = if published.urls.is_empty() { alias() } else { published.urls.clone() };
        ports.entry(published.port).or_insert((false, Vec::new())).1 = urls;
    }
    let port =
        |(port, (listening, urls))| Port { sandbox: sandbox.name.clone(), port, listening, urls };
    Ok(ports.into_iter().map(port).collect())
}

async fn of_all(context: &Context) -> Result<Vec<Port>, CliError> {
    let sandboxes = context.client.list().await?;
    let name = |id: &str| sandboxes.iter().find(|sandbox| sandbox.id == id);
    let ports = context.client.list_all_ports().await?.into_iter().map(|port| {
        let id = port.sandbox_id.unwrap_or_default();
        let sandbox = name(&id).map_or(id, |sandbox| sandbox.name.clone());
        Port { sandbox, port: port.container_port, listening: true, urls: Vec::new() }
    });
    Ok(ports.collect())
}
