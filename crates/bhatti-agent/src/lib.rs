//! The host's client of the guest agent.
//!
//! Offers one call per operation of the agent. How a stream reaches the agent is the
//! [`AgentChannel`]'s concern. Each call has its own stream. If the caller drops a call's future
//! or its streams, the stream closes and the agent stops that operation; a session keeps running.

mod archive;
mod entry;
mod error;
mod exec;
mod file;
mod forward;
mod guest;
mod heard;
mod session;
mod unix;

use std::sync::Arc;
use std::time::Duration;

use bhatti_engine::{AgentChannel, AgentStream};
use bhatti_proto::{CONTROL_PORT, Frame, FrameReader, FrameType, FrameWriter, parse_exit};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{ReadHalf, WriteHalf};

pub use archive::{ArchiveContent, ArchiveUpload};
pub use entry::{TreeEvent, TreeEvents};
pub use error::CallError;
pub use exec::{ExecControl, ExecEvent, ExecInput, ExecOutput};
pub use file::{FileContent, FileEvents, FileUpload, ReadOptions};
pub use guest::GuestEvents;
pub use session::{SessionInput, SessionOutput};
pub use unix::UnixChannel;

use heard::Heard;

/// How long the guest may take to answer a quick request if it sends nothing on any other stream.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// The same limit for the guest's kernel to accept a connection, on channels that report the
/// acceptance.
const OPEN_LIMIT: Duration = Duration::from_secs(15);

/// The frames that the guest sends on one stream.
struct Reader {
    frames: FrameReader<ReadHalf<Box<dyn AgentStream>>>,
    heard: Heard,
}

type Writer = FrameWriter<WriteHalf<Box<dyn AgentStream>>>;

/// The client of the agent of one VM.
#[derive(Clone)]
pub struct AgentClient {
    channel: Arc<dyn AgentChannel>,
    token: Option<Arc<[u8]>>,
    /// The user that file operations act as; the guest's usual user if `None`.
    user: Option<Arc<str>>,
    heard: Heard,
}

impl AgentClient {
    /// Creates a client of the agent behind `channel`.
    #[must_use]
    pub fn new(channel: Arc<dyn AgentChannel>) -> Self {
        Self { channel, token: None, user: None, heard: Heard::default() }
    }

    /// Returns the same client, which sends `token` on every stream.
    #[must_use]
    pub fn with_token(&self, token: &[u8]) -> Self {
        Self { token: Some(token.into()), ..self.clone() }
    }

    /// Returns the same client, whose file operations act as `user`: a name, a number, or
    /// `UID:GID`; the guest's usual user if `None`.
    #[must_use]
    pub fn acting_as(&self, user: Option<&str>) -> Self {
        Self { user: user.map(Into::into), ..self.clone() }
    }

    /// Returns the user that file operations act as, in the form that requests need.
    fn acting_user(&self) -> Option<String> {
        self.user.as_deref().map(str::to_owned)
    }

    /// Opens a stream and queues the token.
    async fn open(&self, port: u32) -> Result<(Reader, Writer), CallError> {
        let opened = async { Ok(self.channel.open(port).await?) };
        let opened = self.heard.within(OPEN_LIMIT, opened).await?;
        let (reader, writer) = tokio::io::split(opened);
        let mut writer = FrameWriter::new(writer);
        if let Some(token) = &self.token {
            // The token is sent together with the request.
            writer.queue(FrameType::AUTH, token).map_err(CallError::Write)?;
        }
        Ok((Reader { frames: FrameReader::new(reader), heard: self.heard.clone() }, writer))
    }

    /// Opens a stream and sends a request on it.
    async fn request(
        &self,
        kind: FrameType,
        request: &impl Serialize,
    ) -> Result<(Reader, Writer), CallError> {
        let (reader, mut writer) = self.open(CONTROL_PORT).await?;
        writer.send_json(kind, request).await.map_err(CallError::Send)?;
        Ok((reader, writer))
    }

    /// Opens a stream and sends a request without a payload on it.
    async fn bare_request(&self, kind: FrameType) -> Result<(Reader, Writer), CallError> {
        let (reader, mut writer) = self.open(CONTROL_PORT).await?;
        writer.send(kind, &[]).await.map_err(CallError::Write)?;
        Ok((reader, writer))
    }

    /// Sends a request that the agent answers with `EXIT`.
    async fn act(&self, kind: FrameType, request: &impl Serialize) -> Result<(), CallError> {
        let (mut reader, _writer) = self.request(kind, request).await?;
        let frame = expect(&mut reader, FrameType::EXIT).await?;
        parse_exit(&frame.payload).map(drop).ok_or(CallError::Unexpected)
    }

    /// Like [`act`](Self::act), for requests that the guest answers quickly. After a timeout the
    /// request may still take effect.
    async fn act_soon(&self, kind: FrameType, request: &impl Serialize) -> Result<(), CallError> {
        self.heard.within(ANSWER_LIMIT, self.act(kind, request)).await
    }

    /// Sends a request that the agent answers with one message.
    async fn ask<T: DeserializeOwned>(
        &self,
        kind: FrameType,
        request: &impl Serialize,
        answer: FrameType,
    ) -> Result<T, CallError> {
        let (mut reader, _writer) = self.request(kind, request).await?;
        expect_soon(&mut reader, answer).await?.json().map_err(|_| CallError::Unexpected)
    }
}

/// Receives the next frame. The end of the stream is an error.
async fn next(reader: &mut Reader) -> Result<Frame, CallError> {
    use bhatti_proto::ReadFrameError;
    match reader.frames.next().await {
        Ok(Some(frame)) => {
            reader.heard.note();
            Ok(frame)
        }
        Ok(None) | Err(ReadFrameError::Io(_) | ReadFrameError::UnexpectedEof) => {
            Err(CallError::Lost)
        }
        Err(garbled @ ReadFrameError::Frame(_)) => Err(CallError::Garbled(garbled)),
    }
}

/// Returns the error if the frame refuses the request.
fn refusal(frame: &Frame) -> Option<CallError> {
    match frame.frame_type {
        FrameType::ERROR_DETAILS => {
            Some(frame.json().map_or(CallError::Unexpected, CallError::Agent))
        }
        FrameType::ERROR => {
            Some(CallError::Refused(String::from_utf8_lossy(&frame.payload).into_owned()))
        }
        _ => None,
    }
}

/// Like [`expect`], for answers that the guest sends quickly: the timeout tells a guest that
/// hangs from a guest that works.
async fn expect_soon(reader: &mut Reader, wanted: FrameType) -> Result<Frame, CallError> {
    let heard = reader.heard.clone();
    heard.within(ANSWER_LIMIT, expect(reader, wanted)).await
}

/// Receives a frame of type `wanted`, or the refusal in its place.
async fn expect(reader: &mut Reader, wanted: FrameType) -> Result<Frame, CallError> {
    let frame = next(reader).await?;
    match refusal(&frame) {
        Some(error) => Err(error),
        None if frame.frame_type == wanted => Ok(frame),
        None => Err(CallError::Unexpected),
    }
}
