//! Drains an abandoned request body so that the client can read the response before the
//! connection closes.
//!
//! If the connection closes while the client still writes, the client loses the connection, and
//! with it a response that it has not read yet.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use http_body_util::BodyExt;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Time limit of a drain. The client may read the response meanwhile, and stop sending.
const LIMIT: Duration = Duration::from_secs(5);

/// Size of a body that surely fits in the socket's buffers, in bytes. Such a body needs no drain.
const SMALL_BYTES: u64 = 8 << 10;

/// Maximum number of bytes to drain for an unauthenticated client.
pub const OF_STRANGERS_BYTES: u64 = 16 << 20;

/// Drains the part of the request's body that the handler leaves unread, up to `most` bytes.
pub fn drain(request: Request, most: u64) -> Request {
    let size = request.body().size_hint();
    if size.upper().is_some_and(|most| most <= SMALL_BYTES) {
        return request;
    }
    let (leave, left) = oneshot::channel();
    tokio::spawn(async move {
        // A body that was read to its end is never sent.
        let Ok(mut body) = left.await else { return };
        let rest = async {
            let mut drained = 0;
            while let Some(Ok(frame)) = Body::frame(&mut body).await
                && drained < most
            {
                drained += frame.data_ref().map_or(0, |data| data.len() as u64);
            }
        };
        drop(timeout(LIMIT, rest).await);
    });
    request.map(|body| Body::new(Leaving { body, leave: Some(leave) }))
}

/// A body that goes to the draining task if it is dropped before its end.
struct Leaving {
    body: Body,
    leave: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Leaving {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(leave) = self.leave.take()
            && !self.body.is_end_stream()
        {
            // Without the draining task, the rest of the body stays unread.
            drop(leave.send(std::mem::take(&mut self.body)));
        }
    }
}
