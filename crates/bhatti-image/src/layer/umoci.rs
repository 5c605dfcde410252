//! The extractor beside `umoci unpack`: the trees of one image are equal, attribute by attribute.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bhatti_testkit::registry::{Layer, make_layout};
use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::tests::{apply_to, header};

/// An archive with entries that take more than a plain header.
struct Archive(Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(&mut self, name: &[u8], header: Header, content: &[u8]) -> &mut Self {
        let mut header = header;
        header.set_size(content.len() as u64);
        let path = Path::new(std::ffi::OsStr::from_bytes(name));
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    fn file(&mut self, name: &str, content: &str) -> &mut Self {
        self.add(name.as_bytes(), header("", EntryType::Regular, 0), content.as_bytes())
    }

    fn directory(&mut self, name: &str, mode: u32) -> &mut Self {
        let mut header = header("", EntryType::Directory, 0);
        header.set_mode(mode);
        self.add(name.as_bytes(), header, b"")
    }

    fn link(&mut self, name: &str, kind: EntryType, target: &str) -> &mut Self {
        let mut header = header("", kind, 0);
        self.0.append_link(&mut header, name, target).unwrap();
        self
    }

    fn extended(&mut self, records: &[(&str, &[u8])], name: &str, content: &str) -> &mut Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self.file(name, content)
    }

    fn done(&mut self) -> Vec<u8> {
        std::mem::replace(&mut self.0, Builder::new(Vec::new())).into_inner().unwrap()
    }
}

/// What is compared of a file.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    /// `None` for a directory that the last layer has no entry for: umoci gives it the time of its
    /// last change, and we do not.
    time: Option<i64>,
    /// Content, or the target of a link.
    content: Vec<u8>,
    attributes: Vec<(String, Vec<u8>)>,
    /// The first name of the same file.
    first_name: PathBuf,
}

fn facts_of(root: &Path) -> BTreeMap<PathBuf, Facts> {
    let (mut all, mut first_names) = (BTreeMap::new(), HashMap::new());
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_owned();
        let mut content = Vec::new();
        if metadata.is_dir() {
            let mut children: Vec<_> =
                fs::read_dir(&path).unwrap().map(|child| child.unwrap().path()).collect();
            // The order decides which name of a file is the first.
            children.sort_by(|one, other| other.cmp(one));
            left.extend(children);
        } else if metadata.is_symlink() {
            content = fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec();
        } else if metadata.is_file() {
            content = fs::read(&path).unwrap();
        }
        let has_time = !metadata.is_dir() || name == Path::new("etc");
        let first_name = first_names.entry(metadata.ino()).or_insert_with(|| name.clone()).clone();
        let facts = Facts {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            links: if metadata.is_dir() { 0 } else { metadata.nlink() },
            time: has_time.then_some(metadata.mtime()),
            content,
            attributes: attributes_of(&path),
            first_name,
        };
        all.insert(name, facts);
    }
    all
}

fn attributes_of(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or_default();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 4096];
            let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
            (String::from_utf8(name.to_vec()).unwrap(), value[..length].to_vec())
        })
        .collect()
}

/// Layers with everything that an honest image may have.
fn layers() -> Vec<Vec<u8>> {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".as_slice();
    let long = "n".repeat(255);
    let mut archive = Archive::new();
    archive.directory("./", 0o755).directory("etc/", 0o750).directory("tmp/", 0o1777);
    archive.directory("deep/", 0o755).directory("deep/a/", 0o700).file("deep/a/b", "deep");
    archive.file("etc/passwd", "root").file("kept", "kept").file("gone", "gone");
    archive.directory("cleared/", 0o755).file("cleared/x", "x").file("cleared/y", "y");
    archive.file("first", "shared").link("second", EntryType::Link, "first");
    archive.link("link", EntryType::Symlink, "etc").link(
        "long",
        EntryType::Symlink,
        &"t".repeat(90),
    );
    archive.link("absolute", EntryType::Symlink, "/etc/passwd");
    archive.file("implied/x/file", "implied").file(&long, "long name");
    archive.add(b"invalid-\xff\xfe", header("", EntryType::Regular, 0), b"name of any bytes");
    archive.file("line\nfeed", "").file("file-then-directory", "1").directory("d-then-f/", 0o755);
    archive.file("d-then-f/x", "1");
    archive.extended(
        &[
            ("SCHILY.xattr.user.note", &[b'v'; 3000]),
            ("SCHILY.xattr.security.capability", capability),
        ],
        "extended",
        "attributes",
    );
    archive.extended(
        &[("uid", b"4000000000"), ("gid", b"3999999999"), ("mtime", b"-5")],
        "owned",
        "x",
    );
    let mut setuid = header("", EntryType::Regular, 0);
    setuid.set_mode(0o6755);
    setuid.set_uid(5);
    archive.add(b"setuid", setuid, b"program");
    let mut fifo = header("", EntryType::Fifo, 0);
    fifo.set_mode(0o620);
    archive.add(b"fifo", fifo, b"");
    let lowest = archive.done();

    archive.file(".wh.gone", "").file("cleared/new", "new").file("cleared/.wh..wh..opq", "");
    archive.file(".wh.first", "").file("link/through", "through a link").file("etc/passwd", "user");
    archive.directory("file-then-directory/", 0o711).file("file-then-directory/x", "2");
    archive.file("d-then-f", "2").directory("deep/", 0o711).file("deep/a/.wh.b", "");
    let middle = archive.done();

    archive.file("gone", "back").file("deep/a/c", "c").link("third", EntryType::Link, "second");
    archive.file("file-then-directory", "3").directory("etc/", 0o700);
    vec![lowest, middle, archive.done()]
}

#[test]
fn trees_equal_those_of_umoci() {
    if !rustix::process::geteuid().is_root() {
        bhatti_testkit::skip("trees beside those of umoci", "only root can set owners");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (layout, bundle) = (directory.path().join("layout"), directory.path().join("bundle"));
    let tree = tempfile::tempdir().unwrap();
    let layers = layers();
    for layer in &layers {
        apply_to(&tree, layer).unwrap();
    }
    let stored: Vec<Layer> = layers.iter().map(|layer| Layer::gzip(layer)).collect();
    make_layout(&layout, &stored, &json!({}));
    #[expect(clippy::disallowed_methods, reason = "a program that the test compares with")]
    let unpacked = std::process::Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:1", layout.display()))
        .arg(&bundle)
        .output()
        .unwrap();
    assert!(unpacked.status.success(), "{}", String::from_utf8_lossy(&unpacked.stderr));

    let (ours, theirs) = (facts_of(tree.path()), facts_of(&bundle.join("rootfs")));

    for (name, facts) in &theirs {
        assert_eq!(ours.get(name), Some(facts), "{}", name.display());
    }
    assert_eq!(ours.len(), theirs.len(), "{:?}", ours.keys());
}
