//! A byte stream as frames, for channels that cannot close one direction before the other.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{FrameReader, FrameType, FrameWriter, ReadFrameError};

/// The most bytes that one frame carries.
const PIECE_BYTES: usize = 32 << 10;

/// Relays `stream` both ways until both directions have ended. Bytes travel as
/// [`STDIN`](FrameType::STDIN), the end of either direction as
/// [`STDIN_EOF`](FrameType::STDIN_EOF).
///
/// # Errors
///
/// Returns an error if the frames fail, or end without a [`STDIN_EOF`](FrameType::STDIN_EOF). One
/// direction may then have been relayed further than the other. If `stream` fails in one
/// direction, only that direction ends.
///
/// # Cancel safety
///
/// Not cancel safe: bytes that were read may not have been written.
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
            // A read error ends this direction like an EOF: the bytes before it still arrive.
            match from_stream.read(&mut piece).await.unwrap_or_default() {
                0 => return writer.send(FrameType::STDIN_EOF, &[]).await,
                length => writer.send(FrameType::STDIN, &piece[..length]).await?,
            }
        }
    };
    let from_frames = async {
        // A stream that takes no more bytes may still send some, so later frames are read and
        // dropped.
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
                    let message = format!("unexpected frame type {} in a stream", frame.frame_type);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, message));
                }
            }
        }
    };
    tokio::try_join!(to_frames, from_frames).map(|_| ())
}
