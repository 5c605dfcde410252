//! `bhatti key`.

use bhatti_api::{ApiKey, CreateKey, KeyScope};
use clap::Subcommand;

use super::{Context, several};
use crate::error::CliError;
use crate::output::{Cell, Table};

#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Create an API key and print it; it is shown only once
    #[command(
        after_help = "Examples:\n  bhatti key create ci --expires-in 30d\n  bhatti key create dashboard --scope read\n  bhatti key create laptop --user alice"
    )]
    Create {
        /// Name of the key
        name: String,
        /// What the key allows
        #[arg(long, value_enum, default_value_t = Scope::Full)]
        scope: Scope,
        /// Time until the key expires: a number and s, m, h or d [default: never]
        #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
        expires_in: Option<u32>,
        /// Create the key for this user (admin only)
        #[arg(long, value_name = "USER")]
        user: Option<String>,
    },
    /// List API keys
    #[command(visible_alias = "ls", after_help = "Example:\n  bhatti key list")]
    List {
        /// List the keys of this user (admin only)
        #[arg(long, value_name = "USER")]
        user: Option<String>,
    },
    /// Delete API keys; everything that they opened ends
    #[command(visible_alias = "rm", after_help = "Example:\n  bhatti key delete ci")]
    Delete {
        /// Names of the keys
        #[arg(required = true)]
        names: Vec<String>,
        /// Delete keys of this user (admin only)
        #[arg(long, value_name = "USER")]
        user: Option<String>,
    },
}

/// What a key allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scope {
    /// Everything that its owner may do
    Full,
    /// Only look: change nothing, run nothing, reach no ports
    Read,
}

const KEYS: Table<ApiKey> = Table {
    header: &["NAME", "SCOPE", "CREATED", "EXPIRES", "LAST USED"],
    row: |key| {
        let time = |at: &Option<String>| match at {
            Some(at) => Cell::Time(at.clone()),
            None => "never".into(),
        };
        vec![
            key.name.clone().into(),
            scope_text(key.scope).into(),
            Cell::Time(key.created_at.clone()),
            time(&key.expires_at),
            time(&key.last_used_at),
        ]
    },
    key: |key| key.name.clone(),
};

const fn scope_text(scope: KeyScope) -> &'static str {
    match scope {
        KeyScope::Full => "full",
        KeyScope::Read => "read",
    }
}

pub(crate) async fn run(context: &Context, command: Key) -> Result<(), CliError> {
    let (client, output) = (&context.client, context.output);
    match command {
        Key::Create { name, scope, expires_in, user } => {
            let scope = match scope {
                Scope::Full => KeyScope::Full,
                Scope::Read => KeyScope::Read,
            };
            let request = CreateKey { name, scope, expires_in_sec: expires_in };
            let created = client.create_key(user.as_deref(), &request).await?;
            if output.quiet && !output.json {
                return output.print(&created.api_key);
            }
            output.show(&created, |created| {
                format!(
                    "key {} created\nAPI key: {}\nIt is shown only once. Use it with: bhatti login URL",
                    created.key.name, created.api_key
                )
            })
        }
        Key::List { user } => output.show_list(&client.list_keys(user.as_deref()).await?, &KEYS),
        Key::Delete { names, user } => {
            several::delete(context, "key", &names, async |name| {
                client.delete_key(user.as_deref(), name).await
            })
            .await
        }
    }
}

/// Parses a time such as `30d`, in seconds.
fn parse_seconds(text: &str) -> Result<u32, String> {
    let expected = || "expected a number and s, m, h or d, such as 30d".to_owned();
    let unit = text.chars().last().ok_or_else(expected)?;
    let seconds: u32 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        _ => return Err(expected()),
    };
    let number: u32 = text[..text.len() - 1].parse().map_err(|_| expected())?;
    match number.checked_mul(seconds) {
        Some(0) => Err("expected at least one second".to_owned()),
        Some(seconds) => Ok(seconds),
        None => Err("expected less than 136 years".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_has_a_number_and_a_unit() {
        for (text, seconds) in [("30s", 30), ("2m", 120), ("1h", 3600), ("30d", 2_592_000)] {
            assert_eq!(parse_seconds(text), Ok(seconds));
        }
        for text in ["", "d", "30", "-1d", "1.5h", "3é", "0s", "99999999d", "1 d"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }
}
