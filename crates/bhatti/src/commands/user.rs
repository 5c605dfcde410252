//! `bhatti user`.

use bhatti_api::CreateUser;

use super::Context;
use crate::cli::User;
use crate::error::CliError;
use crate::output::table;

pub(super) async fn run(context: &Context, command: User) -> Result<(), CliError> {
    match command {
        User::Create { name } => {
            let user =
                context.client.create_user(&CreateUser { name, ..CreateUser::default() }).await?;
            context.output.show(&user, |user| {
                format!(
                    "user {} created\nAPI key: {}\nIt is shown this once. Use it with:\n  export BHATTI_URL=http://HOST:PORT BHATTI_TOKEN={}",
                    user.name, user.api_key, user.api_key
                )
            })
        }
        User::List => {
            let users = context.client.list_users().await?;
            context.output.show(&users, |users| {
                let rows: Vec<_> = users
                    .iter()
                    .map(|user| vec![user.id.clone(), user.name.clone(), user.created_at.clone()])
                    .collect();
                table(&["ID", "NAME", "CREATED"], &rows)
            })
        }
    }
}
