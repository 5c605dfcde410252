//! Events.

use bhatti_api::Event;
use futures_util::StreamExt;
use http::Method;
use http::header::ACCEPT;
use hyper::body::Incoming;
use sse_stream::SseStream;

use crate::path::with_query;
use crate::{Client, ClientError};

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
pub struct Events(SseStream<Incoming>);

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
        Ok(Events(SseStream::new(answer.into_body())))
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
        while let Some(event) = self.0.next().await {
            let event = event.map_err(|error| ClientError::Lost(Box::new(error)))?;
            // A keep-alive message has no data. The data has the id and the type, too.
            if let Some(data) = event.data {
                let event = serde_json::from_str(&data);
                return event.map(Some).map_err(|error| ClientError::Unexpected(error.to_string()));
            }
        }
        Ok(None)
    }
}
