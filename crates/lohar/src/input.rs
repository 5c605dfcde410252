//! Input from the host to the process.

use std::sync::Arc;
use std::time::Duration;

use bhatti_proto::{AgentError, ErrorKind, FrameType};
use bytes::Bytes;
use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::connection::{HostReader, Transport};
use crate::processes::Processes;
use crate::refusal::refused;

/// The most input that waits for a process that does not read it, in bytes. Beyond this, the
/// agent reads no more from the host.
pub(crate) const STDIN_QUEUE_BYTES: usize = 1 << 20;

/// How often the agent checks that the host is still connected, while it reads nothing from the
/// host.
const HOST_CHECK: Duration = Duration::from_millis(250);

/// Input for the process, with the permit for its bytes in the queue.
pub(crate) type Queued = (Bytes, OwnedSemaphorePermit);

/// Writes input to the process and signals its group, as the host requests. Ends when the host is
/// gone.
pub(super) async fn pump<T: Transport>(
    reader: HostReader<T>,
    stdin: pipe::Sender,
    processes: &Processes,
) {
    let (queue, queued) = mpsc::unbounded_channel();
    // A process that reads nothing must not keep this task alive after the host is gone.
    let feed_on = async {
        feed(stdin, queued).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = receive(reader, queue, processes) => {}
        () = feed_on => {}
    }
}

/// Writes queued input to a pipe.
pub(crate) async fn feed(mut stdin: pipe::Sender, mut queued: mpsc::UnboundedReceiver<Queued>) {
    while let Some((bytes, _room)) = queued.recv().await {
        if stdin.write_all(&bytes).await.is_err() {
            // The process has closed its end. Later input is dropped as it arrives.
            return;
        }
    }
}

async fn receive<T: Transport>(
    mut reader: HostReader<T>,
    queue: mpsc::UnboundedSender<Queued>,
    processes: &Processes,
) {
    let room = Arc::new(Semaphore::new(STDIN_QUEUE_BYTES));
    let mut queue = Some(queue);
    while let Ok(Some(frame)) = reader.next().await {
        match frame.frame_type {
            FrameType::STDIN => {
                let host_is_there =
                    enqueue_for(&reader, queue.as_ref(), &room, frame.payload).await;
                if !host_is_there {
                    return;
                }
            }
            FrameType::STDIN_EOF => queue = None,
            FrameType::KILL => processes.signal(Signal::KILL),
            FrameType::SIGNAL => signal(processes, &frame.payload),
            _ => {}
        }
    }
    drop(queue);
    host_gone(&reader).await;
}

/// Waits until the host is gone for good.
async fn host_gone<T: Transport>(reader: &HostReader<T>) {
    while !reader.get_ref().host_is_gone() {
        tokio::time::sleep(HOST_CHECK).await;
    }
}

/// Queues input, and waits while the queue is full. Returns false if the host is gone.
pub(crate) async fn enqueue_for<T: Transport>(
    reader: &HostReader<T>,
    queue: Option<&mpsc::UnboundedSender<Queued>>,
    room: &Arc<Semaphore>,
    bytes: Bytes,
) -> bool {
    tokio::select! {
        biased;
        () = enqueue(queue, room, bytes) => true,
        () = host_gone(reader) => false,
    }
}

async fn enqueue(
    queue: Option<&mpsc::UnboundedSender<Queued>>,
    room: &Arc<Semaphore>,
    bytes: Bytes,
) {
    let Some(queue) = queue else { return };
    // A frame is smaller than the queue.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if let Ok(permit) = Arc::clone(room).acquire_many_owned(length).await {
        // Sending fails only if the process has closed its input.
        drop(queue.send((bytes, permit)));
    }
}

fn signal(processes: &Processes, payload: &[u8]) {
    if let Some(signal) = named_signal(payload) {
        processes.signal(signal);
    }
}

/// The signal of a `SIGNAL` frame.
pub(crate) fn named_signal(payload: &[u8]) -> Option<Signal> {
    payload.first().and_then(|number| Signal::from_named_raw(i32::from(*number)))
}

/// Returns the signal with this number.
pub(crate) fn signal_numbered(number: u8) -> Result<Signal, AgentError> {
    named_signal(&[number])
        .ok_or_else(|| refused(ErrorKind::BadRequest, format!("no signal has the number {number}")))
}
