//! Watching files and directories (inotify).

use std::io;
use std::mem::MaybeUninit;
use std::rc::Rc;

use bhatti_proto::{FileEvent, FileEventKind, FilePathRequest, FrameType};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;

use super::{checked, worker};
use crate::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::refusal::{OpError, io_refused};
use crate::watched;

/// Bytes of events that are taken at once.
const EVENT_BYTES: usize = 4096;

const WATCHED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB);

/// Serves one `FILE_WATCH_REQ`, until the host goes away or the watched path does.
pub(crate) async fn watch<T: Transport>(
    agent: &Rc<Agent>,
    request: &FilePathRequest,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let _counted = agent.count_watch()?;
    let failed = |error: io::Error| io_refused("watch", &path, &error);
    let watched_path = path.clone();
    // Runs on a file thread, because a file system may not answer. Runs as the request's user,
    // because that user must be able to read the watched path.
    let begin = move || {
        let begin = || {
            let descriptor = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
            inotify::add_watch(&descriptor, &watched_path, WATCHED)?;
            Ok(descriptor)
        };
        begin().map_err(|error: Errno| io_refused("watch", &watched_path, &error.into()))
    };
    let descriptor = worker::begin(agent, request.user.as_deref(), begin).await?.end().await?;
    let descriptor = watched::watch(descriptor, Interest::READABLE).map_err(failed)?;
    send(writer, FileEvent { kind: FileEventKind::Watching, name: None }).await?;
    loop {
        let ready = tokio::select! {
            ready = descriptor.readable() => ready,
            // The host sends no more frames, so this is its end.
            _ = reader.next() => return Ok(()),
        };
        let mut ready = ready.map_err(failed)?;
        let (events, over) = take(descriptor.get_ref()).map_err(failed)?;
        if events.is_empty() {
            ready.clear_ready();
        }
        for event in events {
            send(writer, event).await?;
        }
        if over {
            return Ok(());
        }
    }
}

async fn send<T: Transport>(writer: &mut HostWriter<T>, event: FileEvent) -> Result<(), OpError> {
    Ok(writer.send_json(FrameType::FILE_EVENT, &event).await?)
}

/// Returns the pending events, without repetitions, and whether the watch is over.
fn take(descriptor: &std::os::fd::OwnedFd) -> io::Result<(Vec<FileEvent>, bool)> {
    let mut buffer = [MaybeUninit::uninit(); EVENT_BYTES];
    let mut reader = Reader::new(descriptor, &mut buffer);
    let (mut events, mut over) = (Vec::new(), false);
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(Errno::AGAIN) => return Ok((events, over)),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        over |= event.events().contains(ReadFlags::IGNORED);
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
        if let Some(kind) = kind(event.events()) {
            let event = FileEvent { kind, name };
            if events.last() != Some(&event) {
                events.push(event);
            }
        }
        if reader.is_buffer_empty() {
            return Ok((events, over));
        }
    }
}

fn kind(flags: ReadFlags) -> Option<FileEventKind> {
    let has = |wanted: ReadFlags| flags.intersects(wanted);
    if has(ReadFlags::QUEUE_OVERFLOW) {
        Some(FileEventKind::Overflow)
    } else if has(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
        Some(FileEventKind::Created)
    } else if has(ReadFlags::DELETE
        | ReadFlags::DELETE_SELF
        | ReadFlags::MOVED_FROM
        | ReadFlags::MOVE_SELF)
    {
        Some(FileEventKind::Removed)
    } else if has(ReadFlags::MODIFY | ReadFlags::CLOSE_WRITE) {
        Some(FileEventKind::Modified)
    } else if has(ReadFlags::ATTRIB) {
        Some(FileEventKind::Attributes)
    } else {
        None
    }
}
