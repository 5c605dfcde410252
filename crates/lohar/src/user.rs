//! Users of the guest, from its `/etc/passwd` and `/etc/group`.

use std::collections::HashMap;
use std::fs;
use std::io;

use bhatti_proto::{AgentError, ErrorKind};
use rustix::fs::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::Agent;
use crate::refusal::refused;

/// The user of every process and file operation that names none, if the guest has it.
pub(crate) const USUAL_UID: u32 = 1000;

/// A user to run a process as, or to do a file operation as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
    pub(crate) home: String,
}

/// Returns the user that a request acts as: the user that it names, else the user of the
/// settings, else the usual user of a guest. `None` is the agent's own user.
pub(crate) fn acting(agent: &Agent, named: Option<&str>) -> Result<Option<User>, AgentError> {
    if let Some(name) = named {
        return find(name, OtherGroup::SameNumber).map(Some);
    }
    let configured = agent.settings.borrow().user.clone();
    match configured {
        Some(name) => find(&name, OtherGroup::Root).map(Some),
        None if agent.place.is_guest() => {
            Ok(Files::read().user(&USUAL_UID.to_string(), OtherGroup::SameNumber, Known::Only))
        }
        None => Ok(None),
    }
}

/// The group of a user that is a number without an entry in `/etc/passwd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OtherGroup {
    /// The group of the same number.
    SameNumber,
    /// The group 0, as for the `USER` of an image.
    Root,
}

/// Whether a user needs an entry in `/etc/passwd`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// It does.
    Only,
    /// A number does not.
    OrNumber,
}

/// Finds a user by name or number, with `:` and a group, by name or number, in place of the user's
/// own groups.
fn find(wanted: &str, other: OtherGroup) -> Result<User, AgentError> {
    let unknown = || refused(ErrorKind::NoSuchUser, format!("start: unknown user {wanted}"));
    Files::read().user(wanted, other, Known::OrNumber).ok_or_else(unknown)
}

/// `/etc/passwd` and `/etc/group`.
struct Files {
    passwd: String,
    group: String,
}

impl Files {
    fn read() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self { passwd: read("/etc/passwd"), group: read("/etc/group") }
    }

    fn user(&self, wanted: &str, other: OtherGroup, known: Known) -> Option<User> {
        let (name, group) = match wanted.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (wanted, None),
        };
        let user = find_in(&self.passwd, &self.group, name);
        let user = match known {
            Known::Only => user,
            Known::OrNumber => user.or_else(|| User::numeric(name, other)),
        }?;
        let Some(group) = group else { return Some(user) };
        let gid = self.gid(group)?;
        Some(User { gid, groups: vec![gid], ..user })
    }

    fn gid(&self, wanted: &str) -> Option<Gid> {
        let mut entries = self.group.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let entry = entries.find(|entry| entry.len() >= 3 && entry[0] == wanted);
        match entry {
            Some(entry) => entry[2].parse().ok().map(Gid::from_raw),
            None => number(wanted).map(Gid::from_raw),
        }
    }
}

/// Returns the names in `/etc/passwd` or `/etc/group` by their numbers.
pub(crate) fn names(file: &str) -> HashMap<u32, String> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let entry = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        Some((fields.nth(1)?.parse().ok()?, name))
    };
    // Of several names of one number, the first counts.
    let mut names = HashMap::new();
    for (number, name) in text.lines().filter_map(entry) {
        names.entry(number).or_insert(name);
    }
    names
}

/// Parses the number of a user or group. The highest number means "unchanged" to the kernel.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number < u32::MAX)
}

impl User {
    /// A user without an entry in `/etc/passwd`.
    fn numeric(text: &str, other: OtherGroup) -> Option<Self> {
        let uid = number(text)?;
        let gid = match other {
            OtherGroup::SameNumber => Gid::from_raw(uid),
            OtherGroup::Root => Gid::ROOT,
        };
        let (name, home) = (text.to_owned(), "/".to_owned());
        Some(Self { name, uid: Uid::from_raw(uid), gid, groups: vec![gid], home })
    }

    /// Does `work` with this user's rights to files. Only this thread changes its user, and it
    /// must be root's.
    ///
    /// # Panics
    ///
    /// Panics if the kernel does not give root's rights back to the thread, which must not be
    /// used again then.
    pub(crate) fn act<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let root = (Uid::ROOT, Gid::ROOT);
        set_thread_groups(&self.groups)?;
        set_thread_res_gid(None, self.gid, None)?;
        // Last: without root's effective user ID, the thread may not make the calls above. The
        // real and saved user IDs stay root's.
        set_thread_res_uid(None, self.uid, None)?;
        let result = work();
        let restored = set_thread_res_uid(None, root.0, None)
            .and_then(|()| set_thread_res_gid(None, root.1, None))
            .and_then(|()| set_thread_groups(&[]));
        restored.expect("a thread whose real user is root can become root again");
        Ok(result)
    }
}

fn find_in(passwd: &str, group: &str, wanted: &str) -> Option<User> {
    let entries = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = entries
        .into_iter()
        .find(|entry| entry.len() >= 6 && (entry[0] == wanted || entry[2] == wanted))?;
    let name = entry[0].to_owned();
    let gid = Gid::from_raw(entry[3].parse().ok()?);
    let groups =
        std::iter::once(gid).chain(groups_of(group, &name).filter(|other| *other != gid)).collect();
    Some(User {
        uid: Uid::from_raw(entry[2].parse().ok()?),
        gid,
        groups,
        home: entry[5].to_owned(),
        name,
    })
}

fn groups_of<'a>(group: &'a str, name: &'a str) -> impl Iterator<Item = Gid> + 'a {
    group.lines().filter_map(move |line| {
        let mut fields = line.split(':');
        let gid = fields.nth(2)?.parse().ok()?;
        fields.next()?.split(',').any(|member| member == name).then(|| Gid::from_raw(gid))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:1001::/home/user:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:other,user\nuser:x:1001:user\nuserx:x:5:userx\n";

    #[test]
    fn user_is_found_by_name_and_number_with_all_groups() {
        let user = find_in(PASSWD, GROUP, "user").unwrap();

        assert_eq!((user.uid.as_raw(), user.gid.as_raw(), &*user.home), (1000, 1001, "/home/user"));
        assert_eq!(user.groups.iter().map(|gid| gid.as_raw()).collect::<Vec<_>>(), [1001, 27]);
        assert_eq!(find_in(PASSWD, GROUP, "1000"), Some(user));
        assert_eq!(find_in(PASSWD, GROUP, "nobody"), None);
    }

    fn ids(text: &str, other: OtherGroup) -> Option<(u32, u32, String)> {
        let files = Files { passwd: PASSWD.to_owned(), group: GROUP.to_owned() };
        let user = files.user(text, other, Known::OrNumber)?;
        Some((user.uid.as_raw(), user.gid.as_raw(), user.home))
    }

    #[test]
    fn number_needs_no_entry() {
        let of = |text| ids(text, OtherGroup::SameNumber).map(|(uid, gid, _)| (uid, gid));

        assert_eq!(of("4242"), Some((4242, 4242)));
        assert_eq!(of("4242:7"), Some((4242, 7)));
        for wrong in ["", "x", "1:", ":1", "1:2:3", "-1", "4294967295", "1:4294967295"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn user_of_an_image_has_a_group_by_name_or_number() {
        let of = |text| ids(text, OtherGroup::Root);
        let home = |home: &str| home.to_owned();

        assert_eq!(of("user:sudo"), Some((1000, 27, home("/home/user"))));
        assert_eq!(of("1000:5"), Some((1000, 5, home("/home/user"))));
        assert_eq!(of("0"), Some((0, 0, home("/root"))));
        assert_eq!(of("4242"), Some((4242, 0, home("/"))));
        assert_eq!(of("4242:sudo"), Some((4242, 27, home("/"))));
        assert_eq!(of("user:nobody"), None);
        let files = Files { passwd: PASSWD.to_owned(), group: GROUP.to_owned() };
        let user = files.user("user:sudo", OtherGroup::Root, Known::OrNumber).unwrap();
        assert_eq!(user.groups, [Gid::from_raw(27)]);
        assert_eq!(files.user("4242", OtherGroup::SameNumber, Known::Only), None);
    }
}
