//! `bhatti events`.

use bhatti_api::Event;
use bhatti_client::EventFilter;
use clap::Args;

use super::Context;
use crate::error::CliError;
use crate::output::{Cell, Table, one_line};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bhatti events --sandbox dev\n  bhatti events --follow --type sandbox. --json"
)]
pub(crate) struct Events {
    /// Follow new events
    #[arg(short, long)]
    follow: bool,
    /// Only events whose type starts with this
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Only events of this sandbox, by name or id, even if it is destroyed
    #[arg(long)]
    sandbox: Option<String>,
    /// Only events after this one
    #[arg(long, value_name = "NUMBER")]
    after: Option<u64>,
    /// Maximum number of events [default: 100]
    #[arg(long, value_name = "COUNT", conflicts_with = "follow")]
    limit: Option<u32>,
}

const EVENTS: Table<Event> = Table {
    header: &["NUMBER", "TIME", "TYPE", "SANDBOX", "DETAIL"],
    row: |event| {
        vec![
            Cell::number(event.id),
            Cell::Time(event.at.clone()),
            event.kind.clone().into(),
            event.sandbox_name.clone().unwrap_or_else(|| "-".to_owned()).into(),
            detail(event).into(),
        ]
    },
    key: |event| event.id.to_string(),
};

pub(crate) async fn run(context: &Context, arguments: Events) -> Result<(), CliError> {
    let Events { follow, kind, sandbox, after, limit } = arguments;
    let filter = EventFilter { kind, sandbox, after, limit };
    if !follow {
        return context.output.show_list(&context.client.list_events(&filter).await?, &EVENTS);
    }
    let mut events = context.client.follow_events(&filter).await?;
    while let Some(event) = events.next().await? {
        context.output.print(&line(&event, context.output.json)?)?;
    }
    Err(CliError::new("the daemon has stopped").hint("start it again with `bhatti serve`"))
}

/// Formats an event as one line.
fn line(event: &Event, json: bool) -> Result<String, CliError> {
    if json {
        return serde_json::to_string(event).map_err(|error| CliError::of(&error));
    }
    let cells = [
        event.at.clone(),
        event.kind.clone(),
        event.sandbox_name.clone().unwrap_or_else(|| "-".to_owned()),
        detail(event),
    ];
    Ok(cells.map(|cell| one_line(&cell)).join("\t").trim_end().to_owned())
}

fn detail(event: &Event) -> String {
    let pair = |(name, value): (&String, &serde_json::Value)| match value.as_str() {
        Some(text) => format!("{name}={text}"),
        None => format!("{name}={value}"),
    };
    event.detail.as_object().into_iter().flatten().map(pair).collect::<Vec<_>>().join(" ")
}
