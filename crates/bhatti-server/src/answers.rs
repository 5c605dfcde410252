//! Memory budget of large requests, and of responses that are buffered before they are sent: one
//! cap for all users together and one for each user.
//!
//! A [`Part`] is held until the response has been sent, however slowly the caller reads.

mod exec;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Weak};

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bhatti_types::UserId;
use futures_util::stream;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub(crate) use exec::{Collected, exec_answer};

/// Budget of all users together, and of one user, in bytes.
const MEMORY_BYTES: usize = 160 << 20;
const MEMORY_OF_USER_BYTES: usize = 64 << 20;

/// Unit in which memory is reserved, in bytes.
const PIECE_BYTES: usize = 64 * 1024;

/// The memory budget.
pub(crate) struct AnswerMemory {
    all: Arc<Semaphore>,
    of_users: Mutex<HashMap<UserId, Weak<Semaphore>>>,
}

impl Default for AnswerMemory {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(MEMORY_BYTES / PIECE_BYTES)),
            of_users: Mutex::default(),
        }
    }
}

/// The memory of one response. The first unit is free, because most responses need no more.
pub(crate) struct Part {
    all: Arc<Semaphore>,
    of_user: Arc<Semaphore>,
    given: Vec<[OwnedSemaphorePermit; 2]>,
}

impl AnswerMemory {
    /// Returns the part of a new response, with nothing reserved yet.
    pub(crate) fn part(&self, user: UserId) -> Part {
        let mut of_users = self.of_users.lock();
        let of_user = of_users.get(&user).and_then(Weak::upgrade).unwrap_or_else(|| {
            of_users.retain(|_, memory| memory.strong_count() > 0);
            let memory = Arc::new(Semaphore::new(MEMORY_OF_USER_BYTES / PIECE_BYTES));
            of_users.insert(user, Arc::downgrade(&memory));
            memory
        });
        Part { all: Arc::clone(&self.all), of_user, given: Vec::new() }
    }
}

impl Part {
    /// Grows the part to `bytes`. Returns whether enough memory was left.
    pub(crate) fn grow_to(&mut self, bytes: usize) -> bool {
        while bytes > (self.given.len() + 1) * PIECE_BYTES {
            let of_user = Arc::clone(&self.of_user).try_acquire_owned();
            let of_all = Arc::clone(&self.all).try_acquire_owned();
            let (Ok(of_user), Ok(of_all)) = (of_user, of_all) else { return false };
            self.given.push([of_user, of_all]);
        }
        true
    }
}

/// Returns a response with JSON that is complete, and keeps its memory part until the end.
pub(crate) fn json_answer(json: Vec<u8>, part: Part) -> Response {
    let headers = [(CONTENT_TYPE, "application/json")];
    if json.len() <= PIECE_BYTES {
        return (headers, json).into_response();
    }
    let pieces = (0..json.len()).step_by(PIECE_BYTES).map(move |at| {
        let _held = &part;
        // A copy: a slice would keep the whole text in memory after the last piece was made.
        Bytes::copy_from_slice(&json[at..json.len().min(at + PIECE_BYTES)])
    });
    (headers, body(pieces)).into_response()
}

/// Returns a body whose pieces are made when they are sent.
fn body(pieces: impl Iterator<Item = Bytes> + Send + 'static) -> Body {
    Body::from_stream(stream::iter(pieces.map(Ok::<_, Infallible>)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(number: u8) -> UserId {
        UserId::from_entropy([number; 8])
    }

    #[test]
    fn memory_of_a_user_is_limited_and_given_back() {
        let memory = AnswerMemory::default();
        let mut greedy = memory.part(user(1));

        assert!(greedy.grow_to(MEMORY_OF_USER_BYTES));
        assert!(memory.part(user(1)).grow_to(PIECE_BYTES));
        assert!(!memory.part(user(1)).grow_to(3 * PIECE_BYTES));
        assert!(memory.part(user(2)).grow_to(3 * PIECE_BYTES));

        drop(greedy);
        assert!(memory.part(user(1)).grow_to(3 * PIECE_BYTES));
    }

    #[test]
    fn memory_of_all_users_is_limited() {
        let memory = AnswerMemory::default();
        let most = MEMORY_BYTES / MEMORY_OF_USER_BYTES;
        let users = (0..).take(most + 1);
        let mut greedy: Vec<_> = users.map(|number| memory.part(user(number))).collect();

        assert!(greedy[..most].iter_mut().all(|part| part.grow_to(MEMORY_OF_USER_BYTES)));
        assert!(!greedy[most].grow_to(MEMORY_OF_USER_BYTES));

        greedy.clear();
        drop(memory.part(user(9)));
        assert_eq!(memory.of_users.lock().len(), 1);
    }
}
