//! `bhatti publish` and `bhatti unpublish`.

use bhatti_api::PublishPort;
use clap::Args;

use super::Context;
use crate::error::CliError;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti publish dev 8080 --alias shop")]
pub(crate) struct Publish {
    /// Name or id
    sandbox: String,
    /// The port in the sandbox
    port: u16,
    /// Alias in the URL [default: the sandbox's name and six digits]
    #[arg(short, long)]
    alias: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  bhatti unpublish dev 8080")]
pub(crate) struct Unpublish {
    /// Name or id
    sandbox: String,
    /// The port in the sandbox
    port: u16,
}

pub(crate) async fn publish(context: &Context, arguments: Publish) -> Result<(), CliError> {
    let Publish { sandbox, port, alias } = arguments;
    let request = PublishPort { port, alias };
    let publish = async |id: &str| context.client.publish(id, &request).await;
    let published = context.change(&sandbox, publish).await?;
    context.output.show(&published, |published| {
        if published.urls.is_empty() {
            format!(
                "{} (the daemon serves no published ports: set `public_listen` in its config.yaml)",
                published.alias
            )
        } else {
            published.urls.join("\n")
        }
    })
}

pub(crate) async fn unpublish(context: &Context, arguments: &Unpublish) -> Result<(), CliError> {
    let Unpublish { sandbox, port } = arguments;
    let unpublish = async |id: &str| context.client.unpublish(id, *port).await;
    context.change(sandbox, unpublish).await?;
    context.output.done("port", &port.to_string(), "unpublished")
}
