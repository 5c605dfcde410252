//! A byte stream as frames, for channels on which no direction can end before the other.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{FrameReader, FrameType, FrameWriter, ReadFrameError};

/// Bytes that travel in one frame at most.
const PIECE_BYTES: usize = 32 << 10;

/// Relays `stream` both ways, its bytes as [`STDIN`](FrameType::STDIN) and the end of either direction as
/// [`STDIN_EOF`](FrameType::STDIN_EOF), until both have ended.
///
/// # Errors
///
/// Returns an error if the frames fail or end before they said so. One direction may then have been relayed further than the other. A stream
/// that fails in one direction has ended in that direction only.
///
/// # Cancel safety
///
/// Not cancel safe: what was read may not have been written.
pub async fn relay_as_frames<S, R, W>(
    stream: S,
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut from_stream, mut to_stream) = tokio::io::split(stream);
    let to_frames = async {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            // A stream that breaks has ended, too: what it said before still arrives.
            match from_stream.read(&mut piece).await.unwrap_or_default() {
                0 => return writer.send(FrameType::STDIN_EOF, &[]).await,
                length => writer.send(FrameType::STDIN, &piece[..length]).await?,
            }
        }
    };
    let from_frames = async {
        // One that takes nothing more may still have something to say, so the rest is read and dropped.
        let mut takes_more = true;
        loop {
            let frame = reader.next().await.map_err(|error| match error {
                ReadFrameError::Io(error) => error,
                error => io::Error::new(io::ErrorKind::InvalidData, error),
            })?;
            match frame.ok_or(io::ErrorKind::UnexpectedEof)? {
                frame if frame.frame_type == FrameType::STDIN => {
                    takes_more = takes_more && to_stream.write_all(&frame.payload).await.is_ok();
                }
                frame if frame.frame_type == FrameType::STDIN_EOF => {
                    drop(to_stream.shutdown().await);
                    return Ok(());
                }
                frame => {
                    let message = format!("a frame of type {} in a stream", frame.frame_type);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, message));
                }
            }
        }
    };
    tokio::try_join!(to_frames, from_frames).map(|_| ())
}
