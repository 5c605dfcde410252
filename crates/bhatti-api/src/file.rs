//! Files in a sandbox.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    /// Its base name.
    pub name: String,
    /// Its size in bytes.
    pub size: i64,
    /// Its permission bits as four octal digits.
    pub mode: String,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Its modification time, in seconds since 1970.
    pub mtime: i64,
    /// Where it leads, if it is a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// A change of a watched file, or of an entry of a watched directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileChange {
    /// What happened.
    pub kind: FileChangeKind,
    /// The entry of the watched directory; absent if the watched path itself changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// What happened to a watched path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileChangeKind {
    /// It was made, or moved here.
    Created,
    /// Its content changed.
    Modified,
    /// Its owner, mode or times changed.
    Attributes,
    /// It was removed, or moved away.
    Removed,
    /// Changes were lost: read the directory again.
    Overflow,
}

impl FileChangeKind {
    /// Its name, as in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Modified => "modified",
            Self::Attributes => "attributes",
            Self::Removed => "removed",
            Self::Overflow => "overflow",
        }
    }
}

/// Renames a file or directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameFile {
    /// Its path.
    pub from: String,
    /// Its new path.
    pub to: String,
    /// The user that the operation acts as: a name, a number, or `UID:GID` [default: the sandbox's usual user].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Makes a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeDirectory {
    /// Its path.
    pub path: String,
    /// Its permission bits in octal; `0755` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Whether missing parents are made, too, and it may exist already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub parents: bool,
    /// The user that the operation acts as: a name, a number, or `UID:GID` [default: the sandbox's usual user].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Says that an archive was unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unpacked {
    /// `ok`.
    pub status: String,
    /// Paths of entries that were left out: pipes and devices. At most some hundred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
}

/// How the download of an archive ended, in the trailer [`ARCHIVE_OUTCOME`], for clients that send `TE: trailers`. For others an archive
/// that is not whole breaks off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveOutcome {
    /// Paths of entries that were left out: sockets, pipes and devices. At most some hundred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
    /// Why the archive is not whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The name of the trailer that holds an [`ArchiveOutcome`] as JSON, in which every character beyond ASCII is escaped.
pub const ARCHIVE_OUTCOME: &str = "x-archive-outcome";

/// Says that it was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// `ok`.
    pub status: String,
}
