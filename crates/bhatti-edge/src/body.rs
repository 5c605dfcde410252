//! Bodies that hold a value, and bodies that end with a key.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};

use crate::identity::Identity;

/// Size of a body that is sent at once, in bytes.
const SMALL_BYTES: u64 = 64 << 10;

/// Keeps `held` alive until the body has been sent, or is dropped.
pub fn hold(body: Body, held: impl Send + 'static) -> Body {
    Body::new(Held { body, _held: held })
}

/// A body that keeps a value alive.
struct Held<T> {
    body: Body,
    _held: T,
}

// The held value is never accessed, so it need not stay in place.
impl<T> Unpin for Held<T> {}

impl<T: Send + 'static> HttpBody for Held<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream was cut off.
#[derive(Debug, thiserror::Error)]
#[error("the API key is no longer valid")]
struct KeyEnded;

/// Cuts the body of a response off, with an error, as soon as the caller's key is no longer valid.
/// A small body is made already, and is sent: a caller that deletes its own key learns the outcome.
pub fn end_with_key(body: Body, identity: &Identity) -> Body {
    let is_small = body.size_hint().upper().is_some_and(|most| most <= SMALL_BYTES);
    if is_small { body } else { end_input_with_key(body, identity) }
}

/// Cuts the body of a request off as soon as the caller's key is no longer valid, however small the
/// body is: it may be on its way for long.
pub fn end_input_with_key(body: Body, identity: &Identity) -> Body {
    if body.is_end_stream() || identity.is_lasting() {
        return body;
    }
    let identity = identity.clone();
    let ended = Box::pin(async move { identity.ended().await });
    Body::new(Ending { body, ended })
}

/// See [`end_with_key`].
struct Ending {
    body: Body,
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl HttpBody for Ending {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.ended.as_mut().poll(cx).is_ready() {
            // The future must not be polled again.
            self.ended = Box::pin(std::future::pending());
            self.body = Body::empty();
            return Poll::Ready(Some(Err(axum::Error::new(KeyEnded))));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
