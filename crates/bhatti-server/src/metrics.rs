//! The daemon's metrics, in the OpenMetrics text format.

use axum::extract::{MatchedPath, Request};
use axum::response::Response;
use bhatti_control::Control;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio::time::Instant;

type Labels = [(&'static str, String); 3];

/// The metrics of the HTTP API, with the control's.
pub struct HttpMetrics {
    registry: Registry,
    requests: Family<Labels, Histogram, fn() -> Histogram>,
    websockets: Gauge,
}

/// Counts a WebSocket as open until this is dropped.
pub(crate) struct OpenWebSocket(Gauge);

impl Drop for OpenWebSocket {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl HttpMetrics {
    /// Creates metrics without samples.
    pub(crate) fn new(control: &Control) -> Self {
        let mut registry = Registry::default();
        let durations: fn() -> Histogram =
            || Histogram::new(exponential_buckets(0.000_25, 2.0, 18));
        let requests = Family::new_with_constructor(durations);
        registry.register(
            "bhatti_http_request_seconds",
            "Time from a request to the head of its response",
            requests.clone(),
        );
        let websockets = Gauge::default();
        registry.register("bhatti_websockets", "Open WebSockets", websockets.clone());
        control.register_metrics(&mut registry);
        Self { registry, requests, websockets }
    }

    /// Counts a WebSocket as open until the result is dropped.
    pub(crate) fn open_websocket(&self) -> OpenWebSocket {
        self.websockets.inc();
        OpenWebSocket(self.websockets.clone())
    }

    pub(crate) fn open_websockets(&self) -> i64 {
        self.websockets.get()
    }

    /// Returns all metrics as text.
    pub(crate) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// A request that awaits its response. It is counted by its route, not its path, so that the
/// routes bound the number of series.
pub(crate) struct Measured {
    method: &'static str,
    route: String,
    began: Instant,
}

impl Measured {
    pub(crate) fn new(request: &Request) -> Self {
        const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
        let route = request.extensions().get::<MatchedPath>();
        let method = METHODS.into_iter().find(|known| *known == request.method().as_str());
        Self {
            method: method.unwrap_or("other"),
            route: route.map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned()),
            began: Instant::now(),
        }
    }

    /// Records the response and its duration.
    pub(crate) fn end(self, metrics: &HttpMetrics, response: &Response) {
        let status = response.status();
        let status = if self.route.contains("/proxy/") {
            // The application's own status, one of 900: only its class is counted.
            format!("{}xx", status.as_u16() / 100)
        } else {
            status.as_str().to_owned()
        };
        let labels =
            [("method", self.method.to_owned()), ("route", self.route), ("status", status)];
        metrics.requests.get_or_create(&labels).observe(self.began.elapsed().as_secs_f64());
    }
}
