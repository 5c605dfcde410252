//! Frames over asynchronous byte streams.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::frame::{FrameError, FrameType, PAYLOAD_BYTES_MAX, encode, parse};

/// Bytes that one read asks for: a full chunk with its header.
const READ_BYTES: usize = crate::CHUNK_BYTES + 64;

/// Bytes that the first read of a stream asks for: most requests are smaller.
const FIRST_READ_BYTES: usize = 2048;

/// A frame that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The frame's type.
    pub frame_type: FrameType,
    /// The frame's payload.
    pub payload: Bytes,
}

impl Frame {
    /// Decodes the payload as JSON.
    ///
    /// # Errors
    ///
    /// Returns the decoder's error, which names the position.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.payload)
    }
}

/// A frame could not be received.
#[derive(Debug, thiserror::Error)]
pub enum ReadFrameError {
    /// The stream failed.
    #[error("failed to read from the peer")]
    Io(#[source] io::Error),
    /// The stream ended inside a frame.
    #[error("unexpected EOF")]
    UnexpectedEof,
    /// The received bytes are not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A message could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendJsonError {
    /// The message has no JSON form.
    #[error("failed to encode the message")]
    Encode(#[source] serde_json::Error),
    /// The message fits in no frame, or the stream failed.
    #[error("failed to send the message")]
    Send(#[source] io::Error),
}

/// Receives frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    buffer: BytesMut,
    payload_bytes_max: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames from `inner`.
    pub fn new(inner: R) -> Self {
        Self { inner, buffer: BytesMut::new(), payload_bytes_max: PAYLOAD_BYTES_MAX }
    }

    /// Limits later frames to payloads of `bytes` bytes, so that a stream's purpose bounds its
    /// memory.
    pub const fn limit_payload(&mut self, bytes: usize) {
        self.payload_bytes_max = bytes;
    }

    /// Receives the next frame. Returns `None` if the stream ended between two frames.
    ///
    /// # Errors
    ///
    /// Returns an error if the stream fails, ends inside a frame, or contains bytes that are not
    /// a frame.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: received bytes stay in the reader.
    pub async fn next(&mut self) -> Result<Option<Frame>, ReadFrameError> {
        loop {
            self.check_length()?;
            if let Some(parsed) = parse(&self.buffer)? {
                let (frame_type, total_bytes) = (parsed.frame_type, parsed.total_bytes);
                let mut payload = self.buffer.split_to(total_bytes).freeze();
                payload.advance(5);
                return Ok(Some(Frame { frame_type, payload }));
            }
            self.buffer.reserve(if self.buffer.capacity() == 0 {
                FIRST_READ_BYTES
            } else {
                READ_BYTES
            });
            if self.inner.read_buf(&mut self.buffer).await.map_err(ReadFrameError::Io)? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(ReadFrameError::UnexpectedEof)
                };
            }
        }
    }

    /// Rejects a frame that is too large as soon as its length is there.
    fn check_length(&self) -> Result<(), ReadFrameError> {
        let Some(field) = self.buffer.first_chunk::<4>() else { return Ok(()) };
        let length = u32::from_be_bytes(*field) as usize;
        if length > self.payload_bytes_max + 1 {
            return Err(FrameError::TooLarge { length }.into());
        }
        Ok(())
    }

    /// Returns the stream.
    pub const fn get_ref(&self) -> &R {
        &self.inner
    }

    /// Returns the stream, with the bytes that were read past the last frame.
    pub fn into_parts(self) -> (R, Bytes) {
        (self.inner, self.buffer.freeze())
    }
}

/// Sends frames, each with one write.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    buffer: Vec<u8>,
    /// Whether the buffer holds frames that are sent with the next one.
    queued: bool,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Writes frames to `inner`.
    pub const fn new(inner: W) -> Self {
        Self { inner, buffer: Vec::new(), queued: false }
    }

    /// Queues a frame until the next one is sent, so that both arrive in one piece.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::InvalidInput`] if the payload fits in no frame.
    pub fn queue(&mut self, frame_type: FrameType, payload: &[u8]) -> io::Result<()> {
        if !self.queued {
            self.buffer.clear();
        }
        encode(&mut self.buffer, frame_type, payload)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.queued = true;
        Ok(())
    }

    /// Queues a frame whose payload is `message` as JSON.
    ///
    /// # Errors
    ///
    /// Returns an error if the message cannot be encoded.
    pub fn queue_json<T: Serialize>(
        &mut self,
        frame_type: FrameType,
        message: &T,
    ) -> Result<(), SendJsonError> {
        let json = serde_json::to_vec(message).map_err(SendJsonError::Encode)?;
        self.queue(frame_type, &json).map_err(SendJsonError::Send)
    }

    /// Sends the queued frames, and flushes.
    ///
    /// # Errors
    ///
    /// Returns the stream's error.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: part of a frame may have been sent.
    pub async fn flush(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.queued) {
            self.inner.write_all(&self.buffer).await?;
        }
        self.inner.flush().await
    }

    /// Sends one frame after the queued ones, and flushes.
    ///
    /// # Errors
    ///
    /// Returns [`io::ErrorKind::InvalidInput`], with nothing sent, if the payload fits in no
    /// frame; otherwise the stream's error.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: part of the frame may have been sent.
    pub async fn send(&mut self, frame_type: FrameType, payload: &[u8]) -> io::Result<()> {
        self.queue(frame_type, payload)?;
        self.flush().await
    }

    /// Sends one frame whose payload is `message` as JSON.
    ///
    /// # Errors
    ///
    /// Returns an error if the message cannot be encoded or sent.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe, like [`send`](Self::send).
    pub async fn send_json<T: Serialize>(
        &mut self,
        frame_type: FrameType,
        message: &T,
    ) -> Result<(), SendJsonError> {
        let json = serde_json::to_vec(message).map_err(SendJsonError::Encode)?;
        self.send(frame_type, &json).await.map_err(SendJsonError::Send)
    }

    /// Sends `bytes` unchanged, outside any frame, and flushes.
    ///
    /// # Errors
    ///
    /// Returns the stream's error.
    pub async fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.write_all(bytes).await?;
        self.inner.flush().await
    }

    /// Closes the sending direction.
    ///
    /// # Errors
    ///
    /// Returns the stream's error.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        self.inner.shutdown().await
    }

    /// Returns the stream, for bytes outside any frame.
    pub const fn get_mut(&mut self) -> &mut W {
        &mut self.inner
    }

    /// Returns the stream.
    pub fn into_inner(self) -> W {
        self.inner
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use tokio::io::duplex;
    use tokio::sync::Mutex;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[tokio::test]
    async fn frame_over_the_streams_limit_is_refused_before_its_payload() {
        let (mut near, far) = tokio::io::duplex(64);
        let mut reader = FrameReader::new(far);
        reader.limit_payload(1000);
        near.write_all(&1002_u32.to_be_bytes()).await.unwrap();
        let error = reader.next().await.unwrap_err();
        assert!(
            matches!(error, ReadFrameError::Frame(FrameError::TooLarge { length: 1002 })),
            "{error}"
        );
    }

    #[tokio::test]
    async fn stream_that_ends_between_frames_is_a_clean_end() {
        assert!(FrameReader::new(&b""[..]).next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn stream_that_ends_inside_a_frame_is_an_error() {
        for bytes in [&[0, 0, 0][..], &[0, 0, 0, 10], &[0, 0, 0, 10, 2, 1, 1]] {
            let error = FrameReader::new(bytes).next().await.unwrap_err();
            assert!(matches!(error, ReadFrameError::UnexpectedEof), "{bytes:?}: {error}");
        }
    }

    #[tokio::test]
    async fn frames_arrive_in_order_and_leftover_bytes_are_kept() {
        let mut writer = FrameWriter::new(Vec::new());
        for (frame_type, payload) in [(0x01, "a"), (0x02, ""), (0x99, "c")] {
            writer.send(FrameType(frame_type), payload.as_bytes()).await.unwrap();
        }
        writer.send_raw(b"raw").await.unwrap();
        let bytes = writer.into_inner();

        let mut reader = FrameReader::new(&bytes[..]);
        let mut seen = Vec::new();
        for _ in 0..3 {
            let frame = reader.next().await.unwrap().unwrap();
            seen.push((frame.frame_type.0, String::from_utf8(frame.payload.to_vec()).unwrap()));
        }

        assert_eq!(seen, [(0x01, "a".into()), (0x02, String::new()), (0x99, "c".into())]);
        assert_eq!(reader.into_parts().1, "raw");
    }

    #[tokio::test]
    async fn two_writers_with_a_thousand_frames_each_do_not_mix() {
        let (near, far) = duplex(4096);
        let writer = Arc::new(Mutex::new(FrameWriter::new(near)));
        for byte in [b'a', b'b'] {
            let writer = Arc::clone(&writer);
            tokio::spawn(async move {
                for length in 0..1000 {
                    writer.lock().await.send(FrameType::STDOUT, &vec![byte; length]).await.unwrap();
                }
            });
        }
        drop(writer);

        let mut reader = FrameReader::new(far);
        let mut next_length = [0, 0];
        while let Some(frame) = reader.next().await.unwrap() {
            let writer = match frame.payload.first() {
                Some(first) => usize::from(first - b'a'),
                None => usize::from(next_length[0] != 0),
            };
            assert_eq!(frame.payload.len(), next_length[writer]);
            assert!(frame.payload.iter().all(|b| usize::from(b - b'a') == writer));
            next_length[writer] += 1;
        }

        assert_eq!(next_length, [1000, 1000]);
    }

    proptest! {
        #[test]
        fn any_split_of_a_stream_gives_the_same_frames(
            frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 1..20),
            piece in 1usize..64,
        ) {
            let mut bytes = Vec::new();
            for (frame_type, payload) in &frames {
                encode(&mut bytes, FrameType(*frame_type), payload).unwrap();
            }
            let seen = block_on(async {
                let (mut near, far) = duplex(piece);
                let writing = tokio::spawn(async move {
                    for part in bytes.chunks(piece) {
                        near.write_all(part).await.unwrap();
                    }
                });
                let mut reader = FrameReader::new(far);
                let mut seen = Vec::new();
                while let Some(frame) = reader.next().await.unwrap() {
                    seen.push((frame.frame_type.0, frame.payload.to_vec()));
                }
                writing.await.unwrap();
                seen
            });
            prop_assert_eq!(seen, frames);
        }
    }
}
