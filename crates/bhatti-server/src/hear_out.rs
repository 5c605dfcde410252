//! Hears callers out who still send what nobody wants any more.
//!
//! A connection that is closed while its caller writes is lost to it, and with it the answer that it has not read yet.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use http_body_util::BodyExt;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// How long a caller is heard out. It may read its answer meanwhile, and stop.
const LIMIT: Duration = Duration::from_secs(5);

/// What surely fits between caller and daemon, in bytes: nobody has to read it.
const SMALL_BYTES: u64 = 8 << 10;

/// The most that a caller whom nobody knows is heard out for, in bytes.
pub(crate) const OF_STRANGERS_BYTES: u64 = 16 << 20;

/// Has what the handler of a request leaves of its body be read, up to `most` bytes.
pub(crate) fn hear_out(request: Request, most: u64) -> Request {
    let size = request.body().size_hint();
    if size.upper().is_some_and(|most| most <= SMALL_BYTES) {
        return request;
    }
    let (leave, left) = oneshot::channel();
    tokio::spawn(async move {
        // Nothing is left of one that was read to its end.
        let Ok(mut body) = left.await else { return };
        let rest = async {
            let mut heard = 0;
            while let Some(Ok(frame)) = Body::frame(&mut body).await
                && heard < most
            {
                heard += frame.data_ref().map_or(0, |data| data.len() as u64);
            }
        };
        drop(timeout(LIMIT, rest).await);
    });
    request.map(|body| Body::new(Leaving { body, leave: Some(leave) }))
}

/// A body that is passed on when it is dropped before its end.
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
            // Who is not there any more cannot read it either.
            drop(leave.send(std::mem::take(&mut self.body)));
        }
    }
}
