//! Files in a sandbox.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    /// Base name.
    pub name: String,
    /// Size in bytes.
    pub size: i64,
    /// Permission bits as four octal digits.
    pub mode: String,
    /// Whether the entry is a directory.
    pub is_dir: bool,
    /// Modification time, in seconds since 1970.
    pub mtime: i64,
    /// Target of a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// A change of a watched file, or of an entry of a watched directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileChange {
    /// Kind of change.
    pub kind: FileChangeKind,
    /// Entry of the watched directory; absent if the watched path itself changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Kind of change of a watched path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileChangeKind {
    /// The entry was created, or moved here.
    Created,
    /// The content changed.
    Modified,
    /// The owner, mode or times changed.
    Attributes,
    /// The entry was removed, or moved away.
    Removed,
    /// Changes were lost: read the directory again.
    Overflow,
}

impl FileChangeKind {
    /// Returns the name in JSON.
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
    /// Old path.
    #[schema(min_length = 1, max_length = 4096, pattern = "^[^\\u0000]+$")]
    pub from: String,
    /// New path.
    #[schema(min_length = 1, max_length = 4096, pattern = "^[^\\u0000]+$")]
    pub to: String,
    /// User to act as: a name, a number, or `UID:GID` [default: the sandbox's usual user].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Creates a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeDirectory {
    /// Path of the directory.
    #[schema(min_length = 1, max_length = 4096, pattern = "^[^\\u0000]+$")]
    pub path: String,
    /// Permission bits in octal [default: `0755`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[0-7]{0,4}$")]
    pub mode: Option<String>,
    /// Whether to create missing parents, and to accept an existing directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub parents: bool,
    /// User to act as: a name, a number, or `UID:GID` [default: the sandbox's usual user].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// An archive was unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unpacked {
    /// `ok`.
    pub status: String,
    /// Paths of skipped entries: pipes and devices. At most about 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
}

/// The outcome of an archive download, in the trailer [`ARCHIVE_OUTCOME`], for clients that send
/// `TE: trailers`. For other clients, an incomplete archive breaks off.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveOutcome {
    /// Paths of skipped entries: sockets, pipes and devices. At most about 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<String>,
    /// The reason why the archive is incomplete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The name of the trailer that holds an [`ArchiveOutcome`] as JSON, with every non-ASCII
/// character escaped.
pub const ARCHIVE_OUTCOME: &str = "x-archive-outcome";

/// The operation succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// `ok`.
    pub status: String,
}
