//! The way from the host to the process.

use std::sync::Arc;
use std::time::Duration;

use bhatti_proto::FrameType;
use bytes::Bytes;
use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::connection::{HostReader, Transport};
use crate::processes::Processes;

/// Input that may wait for a process that does not read it, in bytes. Beyond it, nothing more is taken from the host.
pub(crate) const STDIN_QUEUE_BYTES: usize = 1 << 20;

/// How often a host that has closed its sending direction is checked for being there at all.
const HOST_CHECK: Duration = Duration::from_millis(250);

/// Input on its way to the process, with the room that it takes in the queue.
pub(crate) type Queued = (Bytes, OwnedSemaphorePermit);

/// Feeds the process and signals its group as the host asks. Ends when the host is gone.
pub(super) async fn pump<T: Transport>(
    reader: HostReader<T>,
    stdin: pipe::Sender,
    processes: &Processes,
) {
    let (queue, queued) = mpsc::unbounded_channel();
    // A process that reads nothing must not keep us when the host is gone.
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
            // The process has closed its end; what still comes is dropped as it arrives.
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

/// Queues input; waits while the queue is full, but not for a host that is gone: then it returns false.
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
        // A process that does not read gets nothing.
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
