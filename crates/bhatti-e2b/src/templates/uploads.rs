//! The archives that SDKs upload for steps that copy files.
//!
//! They are files without a name, charged to their owner, and gone with the daemon.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use bhatti_control::DiskReservation;
use bhatti_types::UserId;
use parking_lot::Mutex;
use tokio::time::Instant;

/// How long a link can be used.
const LINK_LIFETIME: Duration = Duration::from_hours(1);

/// How long an archive is kept.
const KEPT: Duration = Duration::from_hours(1);

/// The maximum number of a user's archives, and of links that can be used.
const ARCHIVES_MAX: usize = 64;
const LINKS_MAX: usize = 256;

/// An uploaded archive.
pub(crate) struct Archive {
    pub(crate) file: File,
    /// Its bytes count against the owner's quota.
    pub(crate) _reserved: Option<DiskReservation>,
}

impl Archive {
    /// Opens the file again, with a position of its own. Builds that run at once read it.
    pub(crate) fn reopen(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// What a link is for: an archive of a user, by its hash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    pub(crate) owner: UserId,
    pub(crate) hash: String,
}

/// The archives and links of all users.
#[derive(Default)]
pub(crate) struct Uploads(Mutex<All>);

#[derive(Default)]
struct All {
    links: HashMap<String, (Link, Instant)>,
    archives: Vec<(Link, Arc<Archive>, Instant)>,
}

impl Uploads {
    /// Adds a link with this token. Returns `false` if the owner has too many.
    pub(crate) fn add_link(&self, token: String, link: Link) -> bool {
        let mut all = self.0.lock();
        all.forget_old();
        if all.links.values().filter(|(known, _)| known.owner == link.owner).count() >= LINKS_MAX {
            return false;
        }
        all.links.insert(token, (link, Instant::now()));
        true
    }

    /// Returns what the link with this token is for.
    pub(crate) fn link(&self, token: &str) -> Option<Link> {
        let mut all = self.0.lock();
        all.forget_old();
        all.links.get(token).map(|(link, _)| link.clone())
    }

    /// Keeps an archive, in place of the one that the link named before. The oldest of an owner go
    /// if there are too many.
    pub(crate) fn keep(&self, link: &Link, archive: Archive) {
        let mut all = self.0.lock();
        all.archives.retain(|(known, ..)| known != link);
        let of_owner = |(known, ..): &(Link, Arc<Archive>, Instant)| known.owner == link.owner;
        if all.archives.iter().filter(|archive| of_owner(archive)).count() >= ARCHIVES_MAX
            && let Some(oldest) = all.archives.iter().position(of_owner)
        {
            all.archives.remove(oldest);
        }
        all.archives.push((link.clone(), Arc::new(archive), Instant::now()));
    }

    /// Returns an archive, which is then kept for another while.
    pub(crate) fn find(&self, link: &Link) -> Option<Arc<Archive>> {
        let mut all = self.0.lock();
        all.forget_old();
        let found = all.archives.iter_mut().find(|(known, ..)| known == link)?;
        found.2 = Instant::now();
        Some(Arc::clone(&found.1))
    }
}

impl All {
    fn forget_old(&mut self) {
        self.links.retain(|_, (_, at)| at.elapsed() < LINK_LIFETIME);
        self.archives.retain(|(_, _, at)| at.elapsed() < KEPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(owner: u8, hash: &str) -> Link {
        Link { owner: UserId::from_entropy([owner; 8]), hash: hash.to_owned() }
    }

    fn archive() -> Archive {
        Archive { file: tempfile::tempfile().unwrap(), _reserved: None }
    }

    #[tokio::test(start_paused = true)]
    async fn links_and_archives_end_after_a_while() {
        let uploads = Uploads::default();
        assert!(uploads.add_link("token".to_owned(), link(1, "a")));
        uploads.keep(&link(1, "a"), archive());
        assert_eq!(uploads.link("token"), Some(link(1, "a")));
        assert!(uploads.find(&link(1, "a")).is_some() && uploads.find(&link(2, "a")).is_none());
        assert_eq!(uploads.link("other"), None);

        tokio::time::advance(LINK_LIFETIME).await;

        assert!(uploads.link("token").is_none() && uploads.find(&link(1, "a")).is_none());
    }

    #[tokio::test]
    async fn archives_and_links_of_a_user_have_limits() {
        let uploads = Uploads::default();
        for number in 0..=ARCHIVES_MAX {
            uploads.keep(&link(1, &number.to_string()), archive());
        }
        uploads.keep(&link(2, "a"), archive());
        assert!(uploads.find(&link(1, "0")).is_none() && uploads.find(&link(1, "1")).is_some());
        for number in 0..LINKS_MAX {
            assert!(uploads.add_link(number.to_string(), link(1, "a")));
        }
        assert!(!uploads.add_link("more".to_owned(), link(1, "a")));
        assert!(uploads.add_link("more".to_owned(), link(2, "a")));
    }
}
