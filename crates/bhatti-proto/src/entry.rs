//! Messages about files with all of their attributes, for hosts that act for many users of a
//! guest. The agent serves them with its own rights. None is in the original protocol.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::is_false;

/// Asks for a file, or for the entries of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryRequest {
    /// The path. `~` and relative paths begin at the user's home, or in the guest's usual
    /// directory.
    pub path: String,
    /// The user that the path is meant for: a name, a number, or `UID:GID`; the guest's usual user
    /// if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The levels of directories to list, at least 1. Without it, the answer is the file itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<u32>,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}

/// What kind of file an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link that leads nowhere.
    Link,
    /// Anything else, such as a device.
    Other,
}

/// A file with its attributes. Of a symbolic link, `kind`, `mode` and `size` are those of the file
/// that it leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The absolute path.
    pub path: String,
    /// The kind.
    pub kind: EntryKind,
    /// The size in bytes.
    pub size: u64,
    /// The permission bits, with setuid, setgid and sticky bits.
    pub mode: u32,
    /// The owner's name, or its number if it has no name.
    pub owner: String,
    /// The group's name, or its number if it has no name.
    pub group: String,
    /// The modification time, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// Where a symbolic link leads: an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// The extended attributes `user.*` that are text, without that prefix.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
}

/// What a path means to a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The absolute path.
    pub path: String,
    /// The user's name.
    pub user: String,
    /// The user's number and its group's, as `UID:GID`.
    pub ids: String,
}

/// How a file is written in place: an existing file is emptied and written, and keeps its mode and
/// its other names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InPlace {
    /// The owner of the file and of new directories on the way, as in [`Place::ids`].
    pub owner: String,
    /// Extended attributes `user.*`, without that prefix, that replace all those that begin with
    /// `prefix`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
    /// See `attributes`. Without it, attributes stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
}

/// Asks for the changes below a directory. They are sent as [`FileEvent`](crate::FileEvent). The
/// host may send [`SYNC`](crate::FrameType::SYNC), which the agent answers with the same after all
/// events so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeWatchRequest {
    /// The absolute path of the directory.
    pub path: String,
    /// Whether directories below it are watched, too, also those made later.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recursive: bool,
    /// Whether a refusal is answered by [`ERROR_DETAILS`](crate::FrameType::ERROR_DETAILS).
    #[serde(default, skip_serializing_if = "is_false")]
    pub error_details: bool,
}
