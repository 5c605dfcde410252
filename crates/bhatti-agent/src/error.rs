//! How calls fail.

use std::io;
use std::time::Duration;

use bhatti_engine::ChannelError;
use bhatti_proto::{AgentError, ReadFrameError, SendJsonError};

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent cannot be reached.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The request could not be sent.
    #[error(transparent)]
    Send(SendJsonError),
    /// Bytes could not be sent.
    #[error("failed to send to the guest agent")]
    Write(#[source] io::Error),
    /// The content to be sent could not be read.
    #[error("failed to read the content to be written")]
    Content(#[source] io::Error),
    /// The agent refused, with a reason.
    #[error("{}", .0.message)]
    Agent(AgentError),
    /// The agent refused, in its own words: an old one, or before it knew that we understand more.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// Nothing accepts at the port.
    #[error("forward to port {port} refused: {message}")]
    ForwardRefused {
        /// The port.
        port: u16,
        /// The guest's words.
        message: String,
    },
    /// The connection broke off before the answer, or while a command ran.
    #[error("the connection to the sandbox was lost while the command ran")]
    Lost,
    /// The guest does not answer.
    #[error("the sandbox does not answer: it said nothing within {} s", limit.as_secs())]
    Silent {
        /// The time that it had.
        limit: Duration,
    },
    /// The guest answers others, and not this.
    #[error("the sandbox is busy: it answers others, and this not within {} s", waited.as_secs())]
    Busy {
        /// The time that it had.
        waited: Duration,
    },
    /// The connection brought something that is no frame.
    #[error("the guest agent sent something that is no frame")]
    Garbled(#[source] ReadFrameError),
    /// The guest says more than is taken.
    #[error("the guest's answer is too long: more than {limit} {what}")]
    TooMuch {
        /// How much is taken.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
    /// The agent answered something else than was asked.
    #[error("the guest agent answered something else than was asked")]
    Unexpected,
    /// This host gives no random bytes.
    #[error("failed to draw a name for the command")]
    Entropy,
}
