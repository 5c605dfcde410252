//! `bhatti inspect`.

use bhatti_api::{AttachedVolume, Isolation, Sandbox};
use clap::Args;

use super::Context;
use super::lifecycle::status;
use crate::error::CliError;
use crate::output::{Cell, mib};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bhatti inspect dev\n  bhatti inspect dev --json | jq .ip")]
pub(crate) struct Inspect {
    /// Name, id, or a prefix of the id of six digits or more
    sandbox: String,
}

pub(crate) async fn run(context: &Context, arguments: &Inspect) -> Result<(), CliError> {
    let inspect = async |id: &str| context.client.inspect(id).await;
    let sandbox = context.read(&arguments.sandbox, inspect).await?;
    context.output.show_facts(&sandbox, describe)
}

fn describe(sandbox: &Sandbox) -> Vec<(&'static str, Cell)> {
    let mut facts = vec![
        ("id", Cell::from(&sandbox.id)),
        ("name", Cell::from(&sandbox.name)),
        ("status", Cell::State(status(sandbox))),
    ];
    facts.extend(sandbox.reason.iter().map(|reason| ("reason", reason.into())));
    let isolation = match sandbox.isolation {
        Isolation::Container => "container (shares this host's kernel)",
        Isolation::Vm => "vm",
    };
    facts.push(("isolation", isolation.into()));
    facts.push(("image", Cell::from(&sandbox.image)));
    facts.push(("cpus", Cell::number(sandbox.cpus)));
    facts.push(("memory", mib(sandbox.memory_mb).into()));
    if let Some(disk) = sandbox.disk_mb {
        facts.push(("disk", mib(disk).into()));
    }
    let address = sandbox.ip.iter().map(|address| format!(", {address}"));
    let allowed = sandbox.network_allow.iter().map(|range| format!(", reaches {range}"));
    let network: String = address.chain(allowed).collect();
    facts.push(("network", format!("{}{network}", sandbox.network).into()));
    facts.extend(sandbox.volumes.iter().map(|used| ("volume", volume(used).into())));
    facts.push(("created", Cell::Time(sandbox.created_at.clone())));
    facts.extend(sandbox.stopped_at.iter().map(|at| ("stopped", Cell::Time(at.clone()))));
    facts.extend(sandbox.expires_at.iter().map(|at| ("expires", Cell::Time(at.clone()))));
    facts.extend(sandbox.on_timeout.iter().map(|then| ("on timeout", then.clone().into())));
    facts.push(("origin", Cell::from(&sandbox.origin)));
    if sandbox.keep_hot {
        facts.push(("keep hot", "yes".into()));
    }
    facts.extend(sandbox.identity.iter().filter_map(|report| report.as_object()).map(identity));
    let variable = |(name, value): (&String, &String)| Cell::from(format!("{name}={value}"));
    facts.extend(sandbox.labels.iter().map(|label| ("label", variable(label))));
    facts.extend(sandbox.secrets.iter().map(|secret| ("secret", secret.into())));
    facts.extend(sandbox.env.iter().map(|pair| ("env", variable(pair))));
    facts
}

fn volume(volume: &AttachedVolume) -> String {
    let how = [(volume.readonly, ", read-only"), (volume.ephemeral, ", deleted with the sandbox")];
    let how: String = how.iter().filter(|(is_so, _)| *is_so).map(|(_, how)| *how).collect();
    let AttachedVolume { name, target, size_mb, .. } = volume;
    format!("{name} at {target}, {}{how}", mib(*size_mb))
}

/// Summarizes the guest's identity report in one line.
fn identity(report: &serde_json::Map<String, serde_json::Value>) -> (&'static str, Cell) {
    let part = |(name, part): (&String, &serde_json::Value)| match part["result"].as_str() {
        Some("done") => Some(name.clone()),
        Some("failed") => Some(format!("{name} FAILED: {}", part["message"])),
        _ => None,
    };
    ("identity", report.iter().filter_map(part).collect::<Vec<_>>().join(", ").into())
}
