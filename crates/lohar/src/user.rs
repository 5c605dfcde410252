//! Users of the guest, from its `/etc/passwd` and `/etc/group`.

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
    let configured = agent.settings.borrow().user.clone();
    match named.map(str::to_owned).or(configured) {
        Some(name) => find(&name).map(Some),
        None if agent.place.is_guest() => Ok(find_known(&USUAL_UID.to_string())),
        None => Ok(None),
    }
}

/// Finds a user by name, by number, or as `UID:GID`. A number needs no entry in `/etc/passwd`:
/// the group then has the same number.
fn find(wanted: &str) -> Result<User, AgentError> {
    find_known(wanted)
        .or_else(|| User::numeric(wanted))
        .ok_or_else(|| refused(ErrorKind::NoSuchUser, format!("start: unknown user {wanted}")))
}

fn find_known(wanted: &str) -> Option<User> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    find_in(&passwd, &group, wanted)
}

impl User {
    /// A user without an entry in `/etc/passwd`: `UID` or `UID:GID`.
    fn numeric(text: &str) -> Option<Self> {
        let (uid, gid) = text.split_once(':').unwrap_or((text, text));
        // The highest number means "unchanged" to the kernel.
        let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number < u32::MAX);
        let (uid, gid) = (Uid::from_raw(number(uid)?), Gid::from_raw(number(gid)?));
        Some(Self { name: text.to_owned(), uid, gid, groups: vec![gid], home: "/".to_owned() })
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

    #[test]
    fn number_needs_no_entry() {
        let ids = |text| User::numeric(text).map(|user| (user.uid.as_raw(), user.gid.as_raw()));

        assert_eq!(ids("4242"), Some((4242, 4242)));
        assert_eq!(ids("4242:7"), Some((4242, 7)));
        for wrong in ["", "x", "1:", ":1", "1:2:3", "-1", "4294967295", "1:4294967295"] {
            assert_eq!(ids(wrong), None, "{wrong}");
        }
    }
}
