//! Watching a directory, and the directories below it, with the agent's rights.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bhatti_proto::{ErrorKind, FileEvent, FileEventKind, FrameType, TreeWatchRequest};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;

use super::{checked, worker};
use crate::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::refusal::{OpError, io_refused, refused};
use crate::watched;

/// Bytes of events that are taken at once.
const EVENT_BYTES: usize = 16 << 10;

/// The most directories of one watch. The kernel's own limit for a user depends on its memory.
const DIRECTORIES_MAX: usize = 8192;

/// The events that the kernel queues by default: `fs.inotify.max_queued_events`.
const QUEUED_EVENTS_MAX: usize = 16_384;

const WATCHED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);

/// Serves one `TREE_WATCH_REQ`, until the host goes away or the directory does.
pub(crate) async fn watch_tree<T: Transport>(
    agent: &Rc<Agent>,
    request: &TreeWatchRequest,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let _counted = agent.count_watch()?;
    let failed = |error: io::Error| io_refused("watch", &path, &error);
    let (top, recursive) = (path.clone(), request.recursive);
    // On a file thread, because a file system may not answer.
    let begin = move || {
        if !fs::metadata(&top).map_err(|error| io_refused("watch", &top, &error))?.is_dir() {
            let message = format!("{} is not a directory", top.display());
            return Err(refused(ErrorKind::NotDirectory, message));
        }
        let descriptor = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let mut tree = Tree { top: top.clone(), recursive, directories: HashMap::new() };
        let begun = descriptor.and_then(|descriptor| {
            tree.add(&descriptor, Path::new(""), &mut Vec::new())?;
            Ok(descriptor)
        });
        let descriptor = begun.map_err(|error| io_refused("watch", &top, &error.into()))?;
        Ok((descriptor, tree))
    };
    let (descriptor, mut tree) = worker::begin_as_agent(agent, begin).await?.end().await?;
    let descriptor = watched::watch(descriptor, Interest::READABLE).map_err(failed)?;
    writer
        .send_json(FrameType::FILE_EVENT, &FileEvent { kind: FileEventKind::Watching, name: None })
        .await?;
    loop {
        let ready = tokio::select! {
            ready = descriptor.readable() => Some(ready.map_err(failed)?),
            frame = reader.next() => match frame? {
                Some(frame) if frame.frame_type == FrameType::SYNC => None,
                Some(_) => continue,
                None => return Ok(()),
            },
        };
        let Taken { events, is_over, is_all } = tree.take(descriptor.get_ref()).map_err(failed)?;
        let sync = ready.is_none();
        if let Some(mut ready) = ready.filter(|_| is_all) {
            ready.clear_ready();
        }
        for event in events {
            writer.send_json(FrameType::FILE_EVENT, &event).await?;
        }
        if sync {
            writer.send(FrameType::SYNC, &[]).await.map_err(crate::refusal::host_gone)?;
        }
        if is_over {
            return Ok(());
        }
    }
}

/// The directories that are watched.
struct Tree {
    top: PathBuf,
    recursive: bool,
    /// The path of each, relative to the top.
    directories: HashMap<i32, PathBuf>,
}

impl Tree {
    /// Watches a directory, and those below it if all are wanted. Files that are there already
    /// become events in `found`: they may be older than the watch of a new directory.
    fn add(
        &mut self,
        descriptor: &OwnedFd,
        relative: &Path,
        found: &mut Vec<FileEvent>,
    ) -> Result<(), Errno> {
        let mut waiting = vec![relative.to_owned()];
        while let Some(relative) = waiting.pop() {
            if self.directories.len() >= DIRECTORIES_MAX {
                return Err(Errno::NOSPC);
            }
            let path = self.top.join(&relative);
            let is_top = relative.as_os_str().is_empty();
            let flags = if is_top { WATCHED } else { WATCHED.union(WatchFlags::DONT_FOLLOW) };
            match inotify::add_watch(descriptor, &path, flags) {
                Ok(watch) => drop(self.directories.insert(watch, relative.clone())),
                Err(Errno::NOSPC) => return Err(Errno::NOSPC),
                // A directory below that is gone meanwhile, or that cannot be watched.
                Err(_) if !is_top => continue,
                Err(error) => return Err(error),
            }
            if !self.recursive {
                continue;
            }
            for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
                let below = relative.join(entry.file_name());
                found.push(FileEvent {
                    kind: FileEventKind::Created,
                    name: Some(below.to_string_lossy().into_owned()),
                });
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    waiting.push(below);
                }
            }
        }
        Ok(())
    }

    /// Returns the events so far, without repetitions in a row. Takes at most as many at once as
    /// the kernel's queue holds: programs may make more meanwhile.
    fn take(&mut self, descriptor: &OwnedFd) -> io::Result<Taken> {
        let (mut events, mut is_over) = (Vec::new(), false);
        let mut taken = 0;
        loop {
            if taken >= QUEUED_EVENTS_MAX {
                return Ok(Taken { events, is_over, is_all: false });
            }
            let raw = read(descriptor)?;
            if raw.is_empty() {
                return Ok(Taken { events, is_over, is_all: true });
            }
            taken += raw.len();
            for Raw { watch, flags, name } in raw {
                if flags.contains(ReadFlags::IGNORED) {
                    let gone = self.directories.remove(&watch);
                    is_over |= gone.is_some_and(|gone| gone.as_os_str().is_empty());
                    continue;
                }
                self.note(descriptor, watch, flags, name.as_deref(), &mut events)?;
            }
        }
    }

    fn note(
        &mut self,
        descriptor: &OwnedFd,
        watch: i32,
        flags: ReadFlags,
        name: Option<&str>,
        events: &mut Vec<FileEvent>,
    ) -> io::Result<()> {
        let Some(kind) = kind(flags) else { return Ok(()) };
        let relative = match (self.directories.get(&watch), name) {
            (Some(directory), Some(name)) => directory.join(name),
            // Of a directory below, its parent reports the same.
            (Some(directory), None) if !directory.as_os_str().is_empty() => return Ok(()),
            (Some(_), None) => PathBuf::new(),
            (None, _) if kind == FileEventKind::Overflow => PathBuf::new(),
            // The directory was moved away, and this event was queued before.
            (None, _) => return Ok(()),
        };
        let text = relative.to_string_lossy().into_owned();
        let event = FileEvent { kind, name: (!text.is_empty()).then_some(text) };
        if events.last() != Some(&event) {
            events.push(event);
        }
        let is_directory = flags.contains(ReadFlags::ISDIR);
        if kind == FileEventKind::Moved && is_directory {
            self.forget(descriptor, &relative);
        }
        if kind == FileEventKind::Created && is_directory && self.recursive {
            let mut found = Vec::new();
            match self.add(descriptor, &relative, &mut found) {
                Ok(()) => events.append(&mut found),
                Err(Errno::NOSPC) => {
                    events.push(FileEvent { kind: FileEventKind::Overflow, name: None });
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Ends the watches of a directory that was moved away, and of those below it.
    fn forget(&mut self, descriptor: &OwnedFd, moved: &Path) {
        self.directories.retain(|watch, path| {
            let stays = !path.starts_with(moved);
            if !stays {
                // The directory may be gone, and its watch with it.
                let _gone: Result<(), Errno> = inotify::remove_watch(descriptor, *watch);
            }
            stays
        });
    }
}

/// Events that were taken.
struct Taken {
    events: Vec<FileEvent>,
    /// Whether the watched directory is gone.
    is_over: bool,
    /// Whether no event was left.
    is_all: bool,
}

/// An event as the kernel reports it.
struct Raw {
    watch: i32,
    flags: ReadFlags,
    name: Option<String>,
}

/// Returns the events that wait now, as many as are taken at once.
fn read(descriptor: &OwnedFd) -> io::Result<Vec<Raw>> {
    let mut buffer = [MaybeUninit::uninit(); EVENT_BYTES];
    let mut reader = Reader::new(descriptor, &mut buffer);
    let mut raw = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => raw.push(Raw {
                watch: event.wd(),
                flags: event.events(),
                name: event.file_name().map(|name| name.to_string_lossy().into_owned()),
            }),
            Err(Errno::AGAIN) => return Ok(raw),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if reader.is_buffer_empty() {
            return Ok(raw);
        }
    }
}

fn kind(flags: ReadFlags) -> Option<FileEventKind> {
    let has = |wanted: ReadFlags| flags.intersects(wanted);
    if has(ReadFlags::QUEUE_OVERFLOW) {
        Some(FileEventKind::Overflow)
    } else if has(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
        Some(FileEventKind::Created)
    } else if has(ReadFlags::DELETE | ReadFlags::DELETE_SELF) {
        Some(FileEventKind::Removed)
    } else if has(ReadFlags::MOVED_FROM) {
        Some(FileEventKind::Moved)
    } else if has(ReadFlags::MODIFY) {
        Some(FileEventKind::Modified)
    } else if has(ReadFlags::ATTRIB) {
        Some(FileEventKind::Attributes)
    } else {
        None
    }
}
