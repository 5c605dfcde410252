//! The host's client of the guest agent.
//!
//! Knows what can be asked of the agent; how its streams travel is the [`AgentChannel`]'s affair. One call, one stream. Dropping a call's
//! future or its streams gives the stream up, and the agent what it was doing for it.

mod archive;
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
pub use error::CallError;
pub use exec::{ExecControl, ExecEvent, ExecInput, ExecOutput};
pub use file::{FileContent, FileEvents, FileUpload, ReadOptions};
pub use guest::GuestEvents;
pub use session::SessionOutput;
pub use unix::UnixChannel;

use heard::Heard;

/// How long a guest that says nothing to anybody may take to answer what takes no time.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// How long its kernel may likewise take to accept a connection, on channels that are told of it.
const OPEN_LIMIT: Duration = Duration::from_secs(15);

/// What the guest says on one stream.
struct Reader {
    frames: FrameReader<ReadHalf<Box<dyn AgentStream>>>,
    heard: Heard,
}

type Writer = FrameWriter<WriteHalf<Box<dyn AgentStream>>>;

/// Asks the agent of one VM.
#[derive(Clone)]
pub struct AgentClient {
    channel: Arc<dyn AgentChannel>,
    token: Option<Arc<[u8]>>,
    /// The user that file operations act as; the guest's usual user without one.
    user: Option<Arc<str>>,
    heard: Heard,
}

impl AgentClient {
    /// A client of the agent behind `channel`.
    #[must_use]
    pub fn new(channel: Arc<dyn AgentChannel>) -> Self {
        Self { channel, token: None, user: None, heard: Heard::default() }
    }

    /// The same client, which shows `token` on every stream.
    #[must_use]
    pub fn with_token(&self, token: &[u8]) -> Self {
        Self { token: Some(token.into()), ..self.clone() }
    }

    /// The same client, whose file operations act as `user` (a name, a number, or `UID:GID`); as the guest's usual user without one.
    #[must_use]
    pub fn acting_as(&self, user: Option<&str>) -> Self {
        Self { user: user.map(Into::into), ..self.clone() }
    }

    /// The user that file operations act as, as requests have it.
    fn acting_user(&self) -> Option<String> {
        self.user.as_deref().map(str::to_owned)
    }

    /// Opens a stream and shows the token.
    async fn open(&self, port: u32) -> Result<(Reader, Writer), CallError> {
        let opened = async { Ok(self.channel.open(port).await?) };
        let opened = self.heard.within(OPEN_LIMIT, opened).await?;
        let (reader, writer) = tokio::io::split(opened);
        let mut writer = FrameWriter::new(writer);
        if let Some(token) = &self.token {
            // It travels with the request.
            writer.queue(FrameType::AUTH, token).map_err(CallError::Write)?;
        }
        Ok((Reader { frames: FrameReader::new(reader), heard: self.heard.clone() }, writer))
    }

    /// Opens a stream with a request on it.
    async fn request(
        &self,
        kind: FrameType,
        request: &impl Serialize,
    ) -> Result<(Reader, Writer), CallError> {
        let (reader, mut writer) = self.open(CONTROL_PORT).await?;
        writer.send_json(kind, request).await.map_err(CallError::Send)?;
        Ok((reader, writer))
    }

    /// Opens a stream with a request on it that has no payload.
    async fn bare_request(&self, kind: FrameType) -> Result<(Reader, Writer), CallError> {
        let (reader, mut writer) = self.open(CONTROL_PORT).await?;
        writer.send(kind, &[]).await.map_err(CallError::Write)?;
        Ok((reader, writer))
    }

    /// A request that is answered by `EXIT`.
    async fn act(&self, kind: FrameType, request: &impl Serialize) -> Result<(), CallError> {
        let (mut reader, _writer) = self.request(kind, request).await?;
        let frame = expect(&mut reader, FrameType::EXIT).await?;
        parse_exit(&frame.payload).map(drop).ok_or(CallError::Unexpected)
    }

    /// The same, of a guest that has nothing to do for it that takes long. What was given up on may still happen.
    async fn act_soon(&self, kind: FrameType, request: &impl Serialize) -> Result<(), CallError> {
        self.heard.within(ANSWER_LIMIT, self.act(kind, request)).await
    }

    /// A request that is answered by one message.
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

/// Receives a frame that has to be there.
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

/// What a frame is if it says that the request was refused.
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

/// The same, from a guest that has nothing to do for it that takes long: one that hangs is told from one that works.
async fn expect_soon(reader: &mut Reader, wanted: FrameType) -> Result<Frame, CallError> {
    let heard = reader.heard.clone();
    heard.within(ANSWER_LIMIT, expect(reader, wanted)).await
}

/// Receives a frame of this type, or the refusal that came instead.
async fn expect(reader: &mut Reader, wanted: FrameType) -> Result<Frame, CallError> {
    let frame = next(reader).await?;
    match refusal(&frame) {
        Some(error) => Err(error),
        None if frame.frame_type == wanted => Ok(frame),
        None => Err(CallError::Unexpected),
    }
}
