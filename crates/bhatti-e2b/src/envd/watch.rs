//! Watches of directories: as streams, and as watchers that clients ask for events.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use axum::response::Response;
use bhatti_agent::{TreeEvent, TreeEvents};
use bhatti_proto::{FileEvent, FileEventKind, Place};
use bhatti_types::SandboxId;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::filesystem::describe;
use super::{place, refused};
use crate::connect::{Code, RpcError, Sender, keepalive, late, over, stream, time_limit};
use crate::{E2b, Target};

/// The most that a watcher keeps for its client, in bytes of JSON. Beyond this, the oldest events
/// are dropped.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// Watchers of one sandbox at once.
const WATCHERS_MAX: usize = 64;

/// The time after which a watcher ends if its client does not ask it.
const IDLE_LIMIT: Duration = Duration::from_secs(3600);

/// How long a watcher may take to give its events.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// What to watch.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Wish {
    path: String,
    recursive: bool,
    include_entry: bool,
}

/// Names a watcher.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Named {
    watcher_id: String,
}

/// The watchers of all sandboxes, by id. Each ends with its sandbox's connection.
#[derive(Clone, Default)]
pub(crate) struct Watchers(Arc<Mutex<HashMap<String, Watcher>>>);

struct Watcher {
    sandbox: SandboxId,
    /// Asks for the events so far.
    asks: mpsc::Sender<oneshot::Sender<Vec<Value>>>,
}

/// Creates a watcher.
pub(super) async fn create(
    e2b: &E2b,
    target: &Target,
    user: Option<&str>,
    wish: Wish,
) -> Result<Value, RpcError> {
    let watch = Watch::begin(target, user, &wish).await?;
    let id = getrandom::u64().map_err(|error| RpcError::new(Code::Internal, error.to_string()))?;
    let id = format!("w{id:016x}");
    let (asks, asked) = mpsc::channel(1);
    let watcher = Watcher { sandbox: target.row.id, asks };
    let watchers = e2b.0.watchers.clone();
    {
        let mut all = watchers.0.lock();
        if all.values().filter(|other| other.sandbox == watcher.sandbox).count() >= WATCHERS_MAX {
            let message = format!("the sandbox has {WATCHERS_MAX} watchers, which is the limit");
            return Err(RpcError::new(Code::ResourceExhausted, message));
        }
        all.insert(id.clone(), watcher);
    }
    let named = id.clone();
    tokio::spawn(async move {
        keep(watch, asked).await;
        watchers.0.lock().remove(&named);
    });
    Ok(json!({ "watcherId": id }))
}

/// Returns the events of a watcher since the last call, also those of changes just now.
pub(super) async fn events(e2b: &E2b, target: &Target, named: Named) -> Result<Value, RpcError> {
    let unknown = || not_found(&named.watcher_id);
    let asks = {
        let watchers = e2b.0.watchers.0.lock();
        let watcher = watchers.get(&named.watcher_id);
        let watcher = watcher.filter(|watcher| watcher.sandbox == target.row.id);
        watcher.ok_or_else(unknown)?.asks.clone()
    };
    let (answer, answered) = oneshot::channel();
    asks.send(answer).await.map_err(|_| unknown())?;
    let answered = timeout(ANSWER_LIMIT, answered).await;
    let silent = |_| RpcError::new(Code::Unavailable, "the sandbox does not answer");
    let events = answered.map_err(silent)?.map_err(|_| unknown())?;
    Ok(json!({ "events": events }))
}

/// Ends a watcher.
pub(super) fn remove(e2b: &E2b, target: &Target, named: &Named) -> Result<Value, RpcError> {
    let mut watchers = e2b.0.watchers.0.lock();
    let is_own = |watcher: &Watcher| watcher.sandbox == target.row.id;
    if !watchers.get(&named.watcher_id).is_some_and(is_own) {
        return Err(not_found(&named.watcher_id));
    }
    // Its task ends when the last sender of questions is dropped.
    watchers.remove(&named.watcher_id);
    Ok(json!({}))
}

fn not_found(id: &str) -> RpcError {
    RpcError::new(Code::NotFound, format!("watcher with id {id} not found"))
}

/// Streams the events of a directory.
pub(super) async fn stream_events(
    target: Target,
    user: Option<&str>,
    headers: &HeaderMap,
    wish: Wish,
) -> Result<Response, RpcError> {
    let limit = time_limit(headers)?;
    let watch = Watch::begin(&target, user, &wish).await?;
    let deadline = limit.map(|limit| Instant::now() + limit);
    let (sender, response) = stream();
    tokio::spawn(follow(watch, sender, deadline, keepalive(headers)));
    Ok(response)
}

async fn follow(mut watch: Watch, sender: Sender, deadline: Option<Instant>, keepalive: Duration) {
    let mut over = std::pin::pin!(over(deadline));
    if !sender.send(&json!({ "start": {} })).await {
        return;
    }
    loop {
        let event = tokio::select! {
            biased;
            () = sender.gone() => return,
            () = &mut over => return sender.end(Err(late())).await,
            event = timeout(keepalive, watch.next()) => event,
        };
        let message = match event {
            Err(_) => json!({ "keepalive": {} }),
            Ok(Some(Happened::Change(event))) => json!({ "filesystem": event }),
            Ok(Some(Happened::Synced)) => continue,
            Ok(None) => {
                // The directory is gone, or the sandbox is: the second cuts the connection.
                if watch.target.used.agent.entry("/", Some("0")).await.is_ok() {
                    sender.end(Ok(())).await;
                }
                return;
            }
        };
        if !sender.send(&message).await {
            return;
        }
    }
}

/// Collects the events of a watcher until its client stops asking, or until its directory or its
/// sandbox is gone and its events are taken.
async fn keep(mut watch: Watch, mut asked: mpsc::Receiver<oneshot::Sender<Vec<Value>>>) {
    let mut events = Events::default();
    let mut waiting: Option<oneshot::Sender<Vec<Value>>> = None;
    let mut idle_until = Instant::now() + IDLE_LIMIT;
    let mut is_over = false;
    loop {
        tokio::select! {
            happened = watch.next(), if !is_over => match happened {
                Some(Happened::Change(event)) => {
                    events.push(event);
                    continue;
                }
                Some(Happened::Synced) => {}
                None => is_over = true,
            },
            ask = asked.recv(), if waiting.is_none() => {
                let Some(ask) = ask else { return };
                idle_until = Instant::now() + IDLE_LIMIT;
                waiting = Some(ask);
                if !is_over && watch.events.sync().await.is_ok() {
                    continue;
                }
            }
            () = sleep_until(idle_until) => return,
        }
        if is_over && events.all.is_empty() {
            return;
        }
        if let Some(ask) = waiting.take() {
            // A client that is gone has lost these events.
            drop(ask.send(events.take()));
        }
    }
}

/// Events that wait for their client.
#[derive(Default)]
struct Events {
    all: VecDeque<(usize, Value)>,
    bytes: usize,
}

impl Events {
    fn push(&mut self, event: Value) {
        let bytes = event.to_string().len();
        self.bytes += bytes;
        self.all.push_back((bytes, event));
        while self.bytes > KEPT_BYTES_MAX
            && let Some((bytes, _)) = self.all.pop_front()
        {
            self.bytes -= bytes;
        }
    }

    fn take(&mut self) -> Vec<Value> {
        self.bytes = 0;
        self.all.drain(..).map(|(_, event)| event).collect()
    }
}

/// A watch of a directory, as the SDKs see it.
struct Watch {
    target: Target,
    top: String,
    include_entry: bool,
    events: TreeEvents,
    /// A change that is not described yet.
    pending: Option<FileEvent>,
}

enum Happened {
    Change(Value),
    Synced,
}

impl Watch {
    async fn begin(target: &Target, user: Option<&str>, wish: &Wish) -> Result<Self, RpcError> {
        let Place { path, .. } = place(target, &wish.path, user).await?;
        let events = target.used.agent.watch_tree(&path, wish.recursive).await;
        let events = events.map_err(|error| refused(error, user))?;
        let include_entry = wish.include_entry;
        Ok(Self { target: target.clone(), top: path, include_entry, events, pending: None })
    }

    /// Waits for the next event. `None` if the directory or the sandbox is gone.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a change is pending until it is described.
    async fn next(&mut self) -> Option<Happened> {
        loop {
            if let Some(event) = self.pending.clone() {
                let described = self.describe(event).await;
                self.pending = None;
                if let Some(event) = described {
                    return Some(Happened::Change(event));
                }
            }
            match self.events.next().await {
                Ok(TreeEvent::Change(event)) => self.pending = Some(event),
                Ok(TreeEvent::Synced) => return Some(Happened::Synced),
                Ok(TreeEvent::Over) | Err(_) => return None,
            }
        }
    }

    async fn describe(&mut self, FileEvent { kind, name }: FileEvent) -> Option<Value> {
        let (kind, exists) = match kind {
            FileEventKind::Created => ("EVENT_TYPE_CREATE", true),
            FileEventKind::Modified => ("EVENT_TYPE_WRITE", true),
            FileEventKind::Attributes => ("EVENT_TYPE_CHMOD", true),
            FileEventKind::Removed => ("EVENT_TYPE_REMOVE", false),
            FileEventKind::Moved => ("EVENT_TYPE_RENAME", false),
            FileEventKind::Watching | FileEventKind::Overflow => return None,
        };
        let name = name.unwrap_or_else(|| ".".to_owned());
        let mut event = json!({ "name": name, "type": kind });
        if self.include_entry && exists {
            let path = format!("{}/{name}", self.top.trim_end_matches('/'));
            if let Ok(entry) = self.target.used.agent.entry(&path, Some("0")).await {
                event["entry"] = describe(&entry);
            }
        }
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_events_are_dropped_beyond_the_limit_in_bytes() {
        let mut events = Events::default();
        let long = "x".repeat(100 << 10);
        for number in 0..30 {
            events.push(json!({ "name": long, "number": number }));
        }
        assert!(events.bytes <= KEPT_BYTES_MAX, "{} bytes", events.bytes);

        let kept = events.take();

        let numbers: Vec<_> = kept.iter().map(|event| event["number"].clone()).collect();
        assert_eq!(numbers, (20..30).map(|number| json!(number)).collect::<Vec<_>>());
        assert_eq!(events.bytes, 0);
        events.push(json!({ "name": "x".repeat(KEPT_BYTES_MAX) }));
        assert!(events.take().is_empty(), "an event that is too long is dropped");
    }
}
