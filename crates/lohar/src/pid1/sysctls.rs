//! Parameters of the guest's kernel whose defaults limit programs in sandboxes.

use std::fs;
use std::io;

/// Editors, bundlers and language servers watch whole trees; the usual limits are made for
/// desktops. Users may ping without privileges.
const VALUES: [(&str, &str); 3] = [
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/inotify/max_user_instances", "1024"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
];

/// Sets all parameters. Returns the first error.
pub(super) fn set() -> io::Result<()> {
    let set = |(name, value)| fs::write(format!("/proc/sys/{name}"), value);
    VALUES.map(set).into_iter().collect()
}
