//! Opening WebSockets.

use futures_util::stream::{SplitSink, SplitStream};
use http::Request;
use http::header::{
    AUTHORIZATION, CONNECTION, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::connect::Stream;
use crate::transport::refusal;
use crate::{Client, ClientError};

type Socket = WebSocketStream<Box<dyn Stream>>;

pub(crate) type Sink = SplitSink<Socket, Message>;
pub(crate) type Source = SplitStream<Socket>;

impl Client {
    pub(crate) async fn open_websocket(&self, path: &str) -> Result<(Sink, Source), ClientError> {
        let host = self.endpoint.host();
        let mut request = Request::builder()
            .uri(format!("ws://{host}{path}"))
            .header(HOST, host)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_KEY, generate_key());
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(());
        let request = request.map_err(|error| ClientError::Unexpected(error.to_string()))?;
        let stream = self.endpoint.connect().await?;
        let opened = tokio_tungstenite::client_async(request, stream).await;
        let (socket, _) = opened.map_err(refused)?;
        Ok(futures_util::StreamExt::split(socket))
    }
}

fn refused(error: Error) -> ClientError {
    match error {
        Error::Http(response) => refusal(response.body().as_deref().unwrap_or_default()),
        error => lost(error),
    }
}

pub(crate) fn lost(error: Error) -> ClientError {
    ClientError::StreamLost(Some(Box::new(error)))
}

/// Returns the error for a text message that cannot be parsed.
pub(crate) fn unexpected(json: &str) -> ClientError {
    ClientError::Unexpected(json.chars().take(200).collect())
}
