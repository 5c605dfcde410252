//! `bhatti secret`.

use bhatti_api::{Secret as Listed, SetSecret};
use clap::Subcommand;

use super::{Context, hidden, several};
use crate::error::CliError;
use crate::output::{Cell, Table};

#[derive(Debug, Subcommand)]
pub(crate) enum Secret {
    /// Set a secret; the value is read from standard input or a prompt
    #[command(
        after_help = "Examples:\n  bhatti secret set API_KEY\n  bhatti secret set API_KEY < key.txt\n\nOne line break at the end of the input is not part of the value."
    )]
    Set {
        /// Name of the secret and of its environment variable
        name: String,
    },
    /// List secrets, without their values
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti secret list")]
    List,
    /// Delete secrets
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti secret delete API_KEY")]
    Delete {
        /// Names of the secrets
        #[arg(required = true)]
        names: Vec<String>,
    },
}

const SECRETS: Table<Listed> = Table {
    header: &["NAME", "CREATED", "UPDATED"],
    row: |secret| {
        vec![
            secret.name.clone().into(),
            Cell::Time(secret.created_at.clone()),
            Cell::Time(secret.updated_at.clone()),
        ]
    },
    key: |secret| secret.name.clone(),
};

pub(crate) async fn run(context: &Context, command: Secret) -> Result<(), CliError> {
    match command {
        Secret::Set { name } => {
            let value = read_value(&name)?;
            let secret = context.client.set_secret(&SetSecret { name, value }).await?;
            context.output.show(&secret, |secret| format!("set {}", secret.name))
        }
        Secret::List => context.output.show_list(&context.client.list_secrets().await?, &SECRETS),
        Secret::Delete { names } => {
            several::delete(context, "secret", &names, async |name| {
                context.client.delete_secret(name).await
            })
            .await
        }
    }
}

fn read_value(name: &str) -> Result<String, CliError> {
    let value = hidden::read(&format!("value of {name}"))?;
    if value.is_empty() {
        return Err(CliError::new("the value is empty")
            .hint(format!("pass it in: bhatti secret set {name} < FILE")));
    }
    Ok(value)
}
