//! Events.

use bhatti_api::Event;
use bytes::BytesMut;
use http::Method;
use http::header::ACCEPT;

use crate::path::with_query;
use crate::{Client, ClientError, Download};

/// Selects events.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    /// Only events whose type starts with this text.
    pub kind: Option<String>,
    /// Only events of this sandbox, by id or name.
    pub sandbox: Option<String>,
    /// Only events after this one.
    pub after: Option<u64>,
    /// The most events to return, 1 to 1000.
    pub limit: Option<u32>,
}

impl EventFilter {
    fn path(&self) -> String {
        let (after, limit) = (self.after.map(|n| n.to_string()), self.limit.map(|n| n.to_string()));
        let all = [
            ("type", &self.kind),
            ("sandbox", &self.sandbox),
            ("after", &after),
            ("limit", &limit),
        ];
        let pairs = all.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)));
        with_query("/events", pairs)
    }
}

/// Events as they happen: a stream of `text/event-stream`.
pub struct Events {
    answer: Download,
    unread: BytesMut,
}

impl Client {
    /// The caller's events, oldest first.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn list_events(&self, filter: &EventFilter) -> Result<Vec<Event>, ClientError> {
        self.get(&filter.path()).await
    }

    /// Follows events as they happen.
    ///
    /// # Errors
    ///
    /// Returns an error if the call fails.
    pub async fn follow_events(&self, filter: &EventFilter) -> Result<Events, ClientError> {
        let headers = [(ACCEPT.as_str(), "text/event-stream")];
        let answer = self.download(Method::GET, &filter.path(), &headers).await?;
        Ok(Events { answer, unread: BytesMut::new() })
    }
}

impl Events {
    /// Waits for the next event. Returns `None` when the daemon stops.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection was lost.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line = self.unread.split_to(end + 1);
                // The lines with the id and the type are skipped: the data has both.
                if let Some(data) = line.strip_prefix(b"data: ") {
                    let event = serde_json::from_slice(data);
                    return event
                        .map(Some)
                        .map_err(|error| ClientError::Unexpected(error.to_string()));
                }
            }
            match self.answer.next().await? {
                Some(bytes) => self.unread.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }
}
