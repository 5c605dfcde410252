//! Writing files: whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use bhatti_proto::{AgentError, ErrorKind, FileWriteRequest, FrameType, StatusOk};
use tokio::time::timeout;

use super::{FILE_MODE, checked, parent, parse_mode};
use crate::agent::Agent;
use crate::connection::{HostReader, HostWriter, Transport};
use crate::refusal::{OpError, io_refused, refused};

/// Who new files belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The agent.
    Agent,
    /// The usual user of a guest.
    UsualUser,
}

/// Serves one `FILE_WRITE_REQ`.
pub(crate) async fn write<T: Transport>(
    agent: &Agent,
    request: &FileWriteRequest,
    mut reader: HostReader<T>,
    writer: &mut HostWriter<T>,
) -> Result<(), OpError> {
    let path = checked(&request.path)?;
    let negative = |_| refused(ErrorKind::BadRequest, "file size must be >= 0");
    let size = if request.until_eof { Ok(None) } else { u64::try_from(request.size).map(Some) };
    let (size, limit) = (size.map_err(negative)?, agent.limits.file_bytes);
    if let Some(size) = size.filter(|size| *size > limit) {
        return Err(too_large(size, limit).into());
    }
    let mode = parse_mode(&request.mode, FILE_MODE)?;
    let owner = if agent.place.is_guest() { Owner::UsualUser } else { Owner::Agent };
    // Who writes to a volume that is frozen waits until it is not, and this thread is the one that is told so.
    agent.awake().await;
    let mut new = NewFile::create(&path, owner)?;
    let length = Length { announced: size, limit };
    if let Err(error) = receive(agent, length, &mut reader, &mut new).await {
        agent.awake().await;
        new.discard().await;
        return Err(error);
    }
    // Waits for the disk, which nobody else should have to.
    let finished = tokio::task::spawn_blocking(move || new.finish(mode));
    finished.await.map_err(|_| refused(ErrorKind::Other, "the write was interrupted"))??;
    Ok(writer.send_json(FrameType::FILE_WRITE_RESP, &StatusOk { status: "ok".to_owned() }).await?)
}

/// How much content is to come.
struct Length {
    /// The size; `None` if it ends when the host says so.
    announced: Option<u64>,
    limit: u64,
}

/// Moves the content into the file.
async fn receive<T: Transport>(
    agent: &Agent,
    Length { announced, limit }: Length,
    reader: &mut HostReader<T>,
    new: &mut NewFile,
) -> Result<(), OpError> {
    let mut written = 0;
    let of = announced.map_or_else(String::new, |size| format!("/{size}"));
    while announced != Some(written) {
        let lost =
            || refused(ErrorKind::Other, format!("connection lost after {written}{of} bytes"));
        let stalled = |_| {
            refused(ErrorKind::Limit, format!("no data came in time, after {written}{of} bytes"))
        };
        let next = timeout(agent.limits.write(), reader.next()).await.map_err(stalled)?;
        let frame = next.ok().flatten().ok_or_else(lost)?;
        match frame.frame_type {
            FrameType::STDIN => {}
            FrameType::STDIN_EOF if announced.is_none() => return Ok(()),
            _ => continue,
        }
        written += frame.payload.len() as u64;
        if let Some(size) = announced.filter(|size| written > *size) {
            let message = format!("more than the announced {size} bytes came");
            return Err(refused(ErrorKind::BadRequest, message).into());
        }
        if written > limit {
            return Err(too_large(written, limit).into());
        }
        agent.awake().await;
        new.write(&frame.payload)?;
    }
    Ok(())
}

fn too_large(size: u64, limit: u64) -> AgentError {
    refused(ErrorKind::TooLarge, format!("file too large: {size} > {limit} bytes"))
}

/// Writes a file that is at hand as a whole.
pub(crate) fn write_whole(
    path: &str,
    content: &[u8],
    mode: u32,
    owner: Owner,
) -> Result<(), AgentError> {
    let mut new = NewFile::create(&checked(path)?, owner)?;
    new.write(content)?;
    new.finish(mode)
}

/// A file that is being written under another name, which goes with it unless it is finished.
struct NewFile {
    target: PathBuf,
    temporary: PathBuf,
    file: File,
    owner: Owner,
    finished: bool,
}

impl NewFile {
    /// Makes the file, and its parents if they are not there, beside its target.
    fn create(target: &Path, owner: Owner) -> Result<Self, AgentError> {
        let directory = parent(target);
        let failed = |error: &io::Error| io_refused("open", target, error);
        let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(directory);
        made.map_err(|error| match error.kind() {
            // It exists, and is a file.
            io::ErrorKind::AlreadyExists => failed(&io::Error::from_raw_os_error(libc::ENOTDIR)),
            _ => failed(&error),
        })?;
        // Two writers of one file never meet: each has a name of its own, until the rename.
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        loop {
            let temporary = directory.join(format!(".lohar-{:016x}", random()));
            match options.open(&temporary) {
                Ok(file) => {
                    return Ok(Self {
                        target: target.to_owned(),
                        temporary,
                        file,
                        owner,
                        finished: false,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(&error)),
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        self.file.write_all(bytes).map_err(|error| io_refused("write", &self.target, &error))
    }

    /// Gives the file its owner, its permissions to the bit, its durability and its name.
    fn finish(mut self, mode: u32) -> Result<(), AgentError> {
        let done = self.try_finish(mode);
        done.map_err(|error| io_refused("rename", &self.target, &error))?;
        self.finished = true;
        Ok(())
    }

    /// Leaves nothing of it: whoever is told that it was not written finds nothing of it either.
    async fn discard(mut self) {
        self.finished = true;
        let temporary = std::mem::take(&mut self.temporary);
        drop(tokio::task::spawn_blocking(|| fs::remove_file(temporary)).await);
    }

    fn try_finish(&self, mode: u32) -> io::Result<()> {
        if self.owner == Owner::UsualUser {
            let usual = Some(crate::user::USUAL_UID);
            fchown(&self.file, usual, usual)?;
        }
        self.file.set_permissions(fs::Permissions::from_mode(mode))?;
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.target)?;
        File::open(parent(&self.target))?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let temporary = std::mem::take(&mut self.temporary);
        // The rename may have happened: then there is nothing of that name.
        let remove = move || drop(fs::remove_file(temporary));
        match tokio::runtime::Handle::try_current() {
            // It may be on a volume that is frozen.
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// A number that no other writer draws.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // A name that is taken is noticed; numbers that repeat cost a few attempts.
    let _filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}
