//! Users of the guest, as its `/etc/passwd` and `/etc/group` have them.

use std::fs;

use bhatti_proto::{AgentError, ErrorKind};
use rustix::fs::{Gid, Uid};

use crate::refusal::refused;

/// The user of every process that names none, if the guest has it.
pub(crate) const USUAL_UID: u32 = 1000;

/// Somebody to run a process as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
    pub(crate) home: String,
}

/// Finds a user by name or number.
pub(crate) fn find(wanted: &str) -> Result<User, AgentError> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    find_in(&passwd, &group, wanted)
        .ok_or_else(|| refused(ErrorKind::NoSuchUser, format!("start: unknown user {wanted}")))
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
}
