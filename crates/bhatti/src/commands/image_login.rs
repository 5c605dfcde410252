//! `bhatti image login`, `logout` and `logins`.

use bhatti_api::{SetRegistryLogin, StoredLogin};
use clap::Args;

use super::{Context, hidden};
use crate::error::CliError;
use crate::output::{Cell, Table};

#[derive(Debug, Args)]
pub(crate) struct Login {
    /// Registry, HOST or HOST:PORT
    #[arg(default_value = "docker.io")]
    registry: String,
    /// User name
    #[arg(short, long, value_name = "NAME")]
    username: String,
}

const LOGINS: Table<StoredLogin> = Table {
    header: &["REGISTRY", "USER", "CREATED", "UPDATED"],
    row: |login| {
        vec![
            login.registry.clone().into(),
            login.username.clone().into(),
            Cell::Time(login.created_at.clone()),
            Cell::Time(login.updated_at.clone()),
        ]
    },
    key: |login| login.registry.clone(),
};

pub(crate) async fn log_in(context: &Context, arguments: Login) -> Result<(), CliError> {
    let Login { registry, username } = arguments;
    let password = hidden::read(&format!("password of {username} at {registry}"))?;
    if password.is_empty() {
        return Err(CliError::new("the password is empty")
            .hint(format!("pass it in: bhatti image login {registry} -u {username} < FILE")));
    }
    let request = SetRegistryLogin { registry, username, password };
    let login = context.client.set_registry_login(&request).await?;
    context
        .output
        .show(&login, |login| format!("logged in at {} as {}", login.registry, login.username))
}

pub(crate) async fn log_out(context: &Context, registry: &str) -> Result<(), CliError> {
    let done = context.client.delete_registry_login(registry).await?;
    context.output.show(&done, |_| format!("logged out at {registry}"))
}

pub(crate) async fn list(context: &Context) -> Result<(), CliError> {
    context.output.show_list(&context.client.list_registry_logins().await?, &LOGINS)
}
