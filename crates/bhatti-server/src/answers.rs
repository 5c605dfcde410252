//! The memory of answers that are collected before they are sent. However many wait for however much, there is no more of it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// All of it, in bytes, and the pieces in which it is given.
const MEMORY_BYTES: usize = 256 << 20;
const PIECE_BYTES: usize = 64 * 1024;

/// The memory that is left.
pub(crate) struct AnswerMemory(Arc<Semaphore>);

impl Default for AnswerMemory {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MEMORY_BYTES / PIECE_BYTES)))
    }
}

/// The part of one answer. The first piece of each is free: most have no more.
pub(crate) struct Part {
    memory: Arc<Semaphore>,
    given: Vec<OwnedSemaphorePermit>,
}

impl AnswerMemory {
    /// The part of a new answer.
    pub(crate) fn part(&self) -> Part {
        Part { memory: Arc::clone(&self.0), given: Vec::new() }
    }
}

impl Part {
    /// Makes the part large enough for `bytes`, if there is so much left.
    pub(crate) fn grow_to(&mut self, bytes: usize) -> bool {
        while bytes > (self.given.len() + 1) * PIECE_BYTES {
            let Ok(piece) = Arc::clone(&self.memory).try_acquire_owned() else { return false };
            self.given.push(piece);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shared_and_given_back() {
        let memory = AnswerMemory::default();
        let mut greedy = memory.part();

        assert!(greedy.grow_to(MEMORY_BYTES));
        assert!(memory.part().grow_to(PIECE_BYTES));
        assert!(!memory.part().grow_to(3 * PIECE_BYTES));

        drop(greedy);
        assert!(memory.part().grow_to(3 * PIECE_BYTES));
    }
}
