//! A command that runs in the guest.

use std::io;

use bhatti_engine::{AgentStream, ChannelError};
use bhatti_proto::{
    CHUNK_BYTES, FrameReader, FrameType, FrameWriter, ReadFrameError, SendJsonError, StartError,
    parse_exit,
};
use bytes::Bytes;
use tokio::io::{ReadHalf, WriteHalf};

/// A command could not be run, or was lost.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The agent cannot be reached.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The request could not be sent.
    #[error(transparent)]
    Send(SendJsonError),
    /// Input could not be sent.
    #[error("failed to send to the guest agent")]
    Write(#[source] io::Error),
    /// The command could not be started.
    #[error("{}", .0.message)]
    Start(StartError),
    /// The agent refused, in its own words.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// The connection broke off while the command ran.
    #[error("the connection to the sandbox was lost while the command ran")]
    Lost,
    /// The connection brought something that is no frame.
    #[error("the guest agent sent something that is no frame")]
    Garbled(#[source] ReadFrameError),
    /// The agent answered something else than was asked.
    #[error("the guest agent answered something else than was asked")]
    Unexpected,
}

/// Something that a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It wrote to its standard output.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It ended. Nothing follows.
    Exit(i32),
}

/// The way to a command.
pub struct ExecInput {
    writer: FrameWriter<WriteHalf<Box<dyn AgentStream>>>,
}

impl ExecInput {
    pub(crate) const fn new(stream: WriteHalf<Box<dyn AgentStream>>) -> Self {
        Self { writer: FrameWriter::new(stream) }
    }

    /// Writes to its standard input. Waits while the command does not read.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), ExecError> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.send(FrameType::STDIN, chunk).await?;
        }
        Ok(())
    }

    /// Ends its standard input.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn end(&mut self) -> Result<(), ExecError> {
        self.send(FrameType::STDIN_EOF, &[]).await
    }

    /// Signals its process group.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn signal(&mut self, number: u8) -> Result<(), ExecError> {
        self.send(FrameType::SIGNAL, &[number]).await
    }

    /// Kills its process group.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is gone.
    pub async fn kill(&mut self) -> Result<(), ExecError> {
        self.send(FrameType::KILL, &[]).await
    }

    async fn send(&mut self, frame_type: FrameType, payload: &[u8]) -> Result<(), ExecError> {
        self.writer.send(frame_type, payload).await.map_err(ExecError::Write)
    }
}

/// The way from a command.
pub struct ExecOutput {
    reader: FrameReader<ReadHalf<Box<dyn AgentStream>>>,
}

impl ExecOutput {
    pub(crate) const fn new(reader: FrameReader<ReadHalf<Box<dyn AgentStream>>>) -> Self {
        Self { reader }
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// Returns [`ExecError::Start`] if the command could not be started, [`ExecError::Lost`] if the connection ended before the command
    /// did.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> Result<ExecEvent, ExecError> {
        loop {
            let frame = match self.reader.next().await {
                Ok(Some(frame)) => frame,
                Ok(None) | Err(ReadFrameError::Io(_) | ReadFrameError::UnexpectedEof) => {
                    return Err(ExecError::Lost);
                }
                Err(garbled @ ReadFrameError::Frame(_)) => return Err(ExecError::Garbled(garbled)),
            };
            return match frame.frame_type {
                FrameType::STDOUT => Ok(ExecEvent::Stdout(frame.payload)),
                FrameType::STDERR => Ok(ExecEvent::Stderr(frame.payload)),
                FrameType::EXIT => {
                    parse_exit(&frame.payload).map(ExecEvent::Exit).ok_or(ExecError::Unexpected)
                }
                FrameType::START_ERROR => {
                    Err(frame.json().map_or(ExecError::Unexpected, ExecError::Start))
                }
                FrameType::ERROR => {
                    Err(ExecError::Refused(String::from_utf8_lossy(&frame.payload).into_owned()))
                }
                // What a newer agent may say beyond this is not for us.
                _ => continue,
            };
        }
    }
}
