//! Output from the process to the host.

use std::os::fd::AsFd;
use std::rc::Rc;

use bhatti_proto::{CHUNK_BYTES, FrameType};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::Agent;
use crate::connection::{HostWriter, Transport};
use crate::discard::discard;
use crate::reaper::Exit;

/// The most that is sent of each stream after the process has ended, in bytes. A pipe holds at
/// most this much (`pipe-max-size`), so everything that the process itself wrote arrives. Later
/// output of background processes is discarded.
const DRAIN_BYTES_MAX: usize = 1 << 20;

/// How the output ended.
pub(super) enum Finished {
    /// The process ended with this code, and its output was sent.
    Exited(i32),
    /// The host does not take the output any more.
    HostGone,
}

/// One output stream of the process.
struct Stream {
    pipe: Option<pipe::Receiver>,
    frame_type: FrameType,
    buffer: Vec<u8>,
}

impl Stream {
    fn new(pipe: pipe::Receiver, frame_type: FrameType) -> Self {
        Self { pipe: Some(pipe), frame_type, buffer: vec![0; CHUNK_BYTES] }
    }

    /// Waits for output and returns its length, 0 at the end. Never resolves after that.
    async fn read(&mut self) -> usize {
        match &mut self.pipe {
            // A pipe that cannot be read has ended.
            Some(pipe) => pipe.read(&mut self.buffer).await.unwrap_or(0),
            None => std::future::pending().await,
        }
    }

    /// Sends the first `length` bytes of the buffer. Length 0 is the end of the stream.
    async fn send<T: Transport>(
        &mut self,
        length: usize,
        writer: &mut HostWriter<T>,
    ) -> Result<(), Finished> {
        if length == 0 {
            self.pipe = None;
            return Ok(());
        }
        writer.send(self.frame_type, &self.buffer[..length]).await.map_err(|_| Finished::HostGone)
    }

    /// Sends the bytes that are in the pipe now.
    async fn drain<T: Transport>(&mut self, writer: &mut HostWriter<T>) -> Result<(), Finished> {
        let mut budget = DRAIN_BYTES_MAX;
        while let Some(pipe) = &self.pipe {
            // Reads directly: the runtime may not know yet that the pipe is readable.
            match rustix::io::read(pipe.as_fd(), &mut self.buffer) {
                // The last writer has gone.
                Ok(0) => self.pipe = None,
                Ok(length) => {
                    self.send(length, writer).await?;
                    budget = budget.saturating_sub(length);
                    if budget == 0 {
                        return Ok(());
                    }
                }
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }
}

/// Sends the output of a process in the order of its arrival, until the process has ended. Pipes
/// that other processes still hold are then drained and discarded.
pub(super) async fn pump<T: Transport>(
    agent: &Rc<Agent>,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
    exit: Exit,
    writer: &mut HostWriter<T>,
) -> Finished {
    match try_pump(
        agent,
        Stream::new(stdout, FrameType::STDOUT),
        Stream::new(stderr, FrameType::STDERR),
        exit,
        writer,
    )
    .await
    {
        Ok(code) => Finished::Exited(code),
        Err(finished) => finished,
    }
}

async fn try_pump<T: Transport>(
    agent: &Rc<Agent>,
    mut stdout: Stream,
    mut stderr: Stream,
    mut exit: Exit,
    writer: &mut HostWriter<T>,
) -> Result<i32, Finished> {
    let code = loop {
        tokio::select! {
            length = stdout.read() => stdout.send(length, writer).await?,
            length = stderr.read() => stderr.send(length, writer).await?,
            code = exit.code() => break code,
        }
    };
    stdout.drain(writer).await?;
    stderr.drain(writer).await?;
    for stream in [stdout, stderr] {
        if let Some(pipe) = stream.pipe {
            discard(agent, pipe);
        }
    }
    Ok(code)
}
