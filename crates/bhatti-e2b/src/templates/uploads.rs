//! The archives that SDKs upload for steps that copy files.
//!
//! They are files without a name, charged to their owner, and gone with the daemon.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::Duration;

use bhatti_control::DiskReservation;
use bhatti_edge::Identity;
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

/// Names an archive: its owner, and the hash that the SDK gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ArchiveOf {
    pub(crate) owner: UserId,
    pub(crate) hash: String,
}

/// A link for an upload.
struct Link {
    token: String,
    /// The key that asked for it. The link ends with the key.
    identity: Identity,
    hash: String,
    at: Instant,
}

struct Kept {
    name: ArchiveOf,
    archive: Arc<Archive>,
    at: Instant,
}

/// The archives and links of all users, the oldest first.
#[derive(Default)]
pub(crate) struct Uploads(Mutex<All>);

#[derive(Default)]
struct All {
    links: Vec<Link>,
    archives: Vec<Kept>,
}

impl Uploads {
    /// Adds a link with this token, for an archive with this hash. The oldest of a user goes if
    /// there are too many.
    pub(crate) fn add_link(&self, token: String, identity: Identity, hash: String) {
        let mut all = self.0.lock();
        all.forget_old();
        let owner = identity.user();
        make_room(&mut all.links, LINKS_MAX, |link| link.identity.user() == owner);
        all.links.push(Link { token, identity, hash, at: Instant::now() });
    }

    /// Returns whose archive the link with this token is for, and its hash.
    pub(crate) fn link(&self, token: &str) -> Option<(Identity, String)> {
        let mut all = self.0.lock();
        all.forget_old();
        let link = all.links.iter().find(|link| link.token == token)?;
        Some((link.identity.clone(), link.hash.clone()))
    }

    /// Keeps an archive, in place of the one of that name. The oldest of a user goes if there are
    /// too many.
    pub(crate) fn keep(&self, name: ArchiveOf, archive: Archive) {
        let mut all = self.0.lock();
        all.archives.retain(|kept| kept.name != name);
        make_room(&mut all.archives, ARCHIVES_MAX, |kept| kept.name.owner == name.owner);
        all.archives.push(Kept { name, archive: Arc::new(archive), at: Instant::now() });
    }

    /// Returns an archive, which is then kept for another while.
    pub(crate) fn find(&self, name: &ArchiveOf) -> Option<Arc<Archive>> {
        let mut all = self.0.lock();
        all.forget_old();
        let found = all.archives.iter_mut().find(|kept| kept.name == *name)?;
        found.at = Instant::now();
        Some(Arc::clone(&found.archive))
    }
}

/// Removes the first element of those that are counted, if there are `most` of them.
fn make_room<T>(all: &mut Vec<T>, most: usize, counts: impl Fn(&T) -> bool) {
    if all.iter().filter(|one| counts(one)).count() >= most
        && let Some(oldest) = all.iter().position(counts)
    {
        all.remove(oldest);
    }
}

impl All {
    fn forget_old(&mut self) {
        self.links.retain(|link| link.at.elapsed() < LINK_LIFETIME && link.identity.is_valid());
        self.archives.retain(|kept| kept.at.elapsed() < KEPT);
    }
}

#[cfg(test)]
mod tests {
    use bhatti_edge::{Keyring, generate_key, hash_key};
    use bhatti_store::KeyRow;
    use bhatti_types::KeyScope;

    use super::*;

    fn named(owner: u8, hash: &str) -> ArchiveOf {
        ArchiveOf { owner: UserId::from_entropy([owner; 8]), hash: hash.to_owned() }
    }

    fn archive() -> Archive {
        Archive { file: tempfile::tempfile().unwrap(), _reserved: None }
    }

    fn keyring() -> (Keyring, KeyRow, Identity) {
        let text = generate_key().unwrap();
        let row = KeyRow {
            owner: UserId::from_entropy([1; 8]),
            name: "key".to_owned(),
            hash: hash_key(&text),
            scope: KeyScope::Full,
            created_at: String::new(),
            expires_at: None,
            last_used_at: None,
        };
        let keyring = Keyring::new(std::slice::from_ref(&row));
        let identity = Identity::of(keyring.find(&text).unwrap());
        (keyring, row, identity)
    }

    #[tokio::test(start_paused = true)]
    async fn links_and_archives_end_after_a_while() {
        let uploads = Uploads::default();
        uploads.add_link("token".to_owned(), Identity::ADMIN, "a".to_owned());
        uploads.keep(named(1, "a"), archive());
        assert_eq!(uploads.link("token").unwrap().1, "a");
        assert!(uploads.find(&named(1, "a")).is_some() && uploads.find(&named(2, "a")).is_none());
        assert!(uploads.link("other").is_none());

        tokio::time::advance(LINK_LIFETIME).await;

        assert!(uploads.link("token").is_none() && uploads.find(&named(1, "a")).is_none());
    }

    #[tokio::test]
    async fn link_ends_with_the_key_that_asked_for_it() {
        let uploads = Uploads::default();
        let (keyring, row, identity) = keyring();
        uploads.add_link("token".to_owned(), identity, "a".to_owned());
        assert_eq!(uploads.link("token").unwrap().0.user(), row.owner);

        assert!(keyring.revoke(row.owner, &row.name));

        assert!(uploads.link("token").is_none());
    }

    #[tokio::test]
    async fn oldest_archives_and_links_of_a_user_go() {
        let uploads = Uploads::default();
        for number in 0..=ARCHIVES_MAX {
            uploads.keep(named(1, &number.to_string()), archive());
        }
        uploads.keep(named(2, "a"), archive());
        assert!(uploads.find(&named(1, "0")).is_none() && uploads.find(&named(1, "1")).is_some());
        let (_keyring, _, other) = keyring();
        uploads.add_link("other".to_owned(), other, "a".to_owned());
        for number in 0..=LINKS_MAX {
            uploads.add_link(number.to_string(), Identity::ADMIN, "a".to_owned());
        }
        assert!(uploads.link("0").is_none() && uploads.link("1").is_some());
        assert!(uploads.link("other").is_some());
    }
}
