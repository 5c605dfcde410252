//! `bhatti inspect`.

use bhatti_api::{AttachedVolume, Sandbox};

use super::Context;
use super::lifecycle::status;
use crate::cli::Target;
use crate::error::CliError;

pub(super) async fn run(context: &Context, target: &Target) -> Result<(), CliError> {
    let sandbox = context.client.inspect(&target.sandbox).await?;
    context.output.show(&sandbox, describe)
}

fn describe(sandbox: &Sandbox) -> String {
    let mut lines = vec![
        format!("id:       {}", sandbox.id),
        format!("name:     {}", sandbox.name),
        format!("status:   {}", status(sandbox)),
    ];
    lines.extend(sandbox.reason.iter().map(|reason| format!("reason:   {reason}")));
    lines.push(format!("cpus:     {}", sandbox.cpus));
    lines.push(format!("memory:   {} MiB", sandbox.memory_mb));
    let address = sandbox.ip.iter().map(|address| format!(", {address}"));
    let allowed = sandbox.network_allow.iter().map(|range| format!(", reaches {range}"));
    let network: String = address.chain(allowed).collect();
    lines.push(format!("network:  {}{network}", sandbox.network));
    lines.extend(sandbox.volumes.iter().map(volume));
    lines.push(format!("created:  {}", sandbox.created_at));
    lines.push(format!("origin:   {}", sandbox.origin));
    if sandbox.keep_hot {
        lines.push("keep hot: yes".to_owned());
    }
    lines.extend(sandbox.identity.iter().filter_map(|report| report.as_object()).map(identity));
    lines.extend(sandbox.env.iter().map(|(name, value)| format!("env:      {name}={value}")));
    lines.join("\n")
}

fn volume(volume: &AttachedVolume) -> String {
    let how = [(volume.readonly, ", read-only"), (volume.ephemeral, ", its own")];
    let how: String = how.iter().filter(|(is_so, _)| *is_so).map(|(_, how)| *how).collect();
    let AttachedVolume { name, target, size_mb, .. } = volume;
    format!("volume:   {name} at {target}, {size_mb} MiB{how}")
}

/// What a guest did to become itself, in one line.
fn identity(report: &serde_json::Map<String, serde_json::Value>) -> String {
    let part = |(name, part): (&String, &serde_json::Value)| match part["result"].as_str() {
        Some("done") => Some(name.clone()),
        Some("failed") => Some(format!("{name} FAILED: {}", part["message"])),
        _ => None,
    };
    format!("identity: {}", report.iter().filter_map(part).collect::<Vec<_>>().join(", "))
}
