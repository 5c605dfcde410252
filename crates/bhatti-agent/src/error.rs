//! Errors of calls.

use std::io;
use std::time::Duration;

use bhatti_engine::ChannelError;
use bhatti_proto::{AgentError, ReadFrameError, SendJsonError};

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent is not reachable.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The request could not be sent.
    #[error(transparent)]
    Send(SendJsonError),
    /// Bytes could not be sent.
    #[error("failed to send to the guest agent")]
    Write(#[source] io::Error),
    /// The content to send could not be read.
    #[error("failed to read the content to be written")]
    Content(#[source] io::Error),
    /// The agent refused, with a reason code.
    #[error("{}", .0.message)]
    Agent(AgentError),
    /// The agent refused with a text alone: an old agent, or a refusal before the agent knew that
    /// this client accepts reason codes.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// Nothing accepts connections at the port.
    #[error("forward to port {port} refused: {message}")]
    ForwardRefused {
        /// The port.
        port: u16,
        /// The guest's error text.
        message: String,
    },
    /// The connection ended before the answer, or while a command ran.
    #[error("the connection to the sandbox was lost")]
    Lost,
    /// The guest answers nothing at all.
    #[error("the sandbox does not answer: no message within {} s", limit.as_secs())]
    Silent {
        /// The time that the guest had.
        limit: Duration,
    },
    /// The guest answers other requests, but not this one.
    #[error("the sandbox is busy with other requests: no answer within {} s", waited.as_secs())]
    Busy {
        /// The time that the guest had.
        waited: Duration,
    },
    /// The received bytes are not a frame.
    #[error("the guest agent sent bytes that are not a frame")]
    Garbled(#[source] ReadFrameError),
    /// The answer exceeds a limit of this client.
    #[error("the guest's answer is too long: more than {limit} {what}")]
    TooMuch {
        /// The limit.
        limit: usize,
        /// The unit of the limit.
        what: &'static str,
    },
    /// The agent sent another answer than the request calls for.
    #[error("the guest agent sent an unexpected answer")]
    Unexpected,
    /// The host's random number generator failed.
    #[error("failed to get random bytes from this host")]
    Entropy,
}
