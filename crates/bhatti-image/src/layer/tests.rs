use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::*;

const LIMITS: Limits = Limits { entries: 10_000, bytes: 1 << 30 };

/// Makes a layer. `NAME/` is a directory, `NAME -> TARGET` a symbolic link, `NAME => TARGET` a
/// hard link, `NAME !KIND` an entry of that type, and any other name a file with this content.
fn layer(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, content) in entries {
        let (name, kind, link) = match *name {
            name if name.contains(" -> ") => split(name, " -> ", EntryType::Symlink),
            name if name.contains(" => ") => split(name, " => ", EntryType::Link),
            name if name.contains(" !") => {
                let (name, kind) = name.split_once(" !").unwrap();
                (name, EntryType::new(kind.as_bytes()[0]), "")
            }
            name if name.ends_with('/') => (name, EntryType::Directory, ""),
            name => (name, EntryType::Regular, ""),
        };
        let mut header = header(name, kind, content.len() as u64);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn split<'a>(name: &'a str, by: &str, kind: EntryType) -> (&'a str, EntryType, &'a str) {
    let (name, target) = name.split_once(by).unwrap();
    (name, kind, target)
}

/// Makes a header of a file of this process's user.
pub(super) fn header(name: &str, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o755);
    header.set_mtime(1_000_000_000);
    header.set_uid(rustix::process::geteuid().as_raw().into());
    header.set_gid(rustix::process::getegid().as_raw().into());
    header
}

pub(super) fn apply_to(tree: &TempDir, layer: &[u8]) -> Result<Applied, LayerError> {
    apply_with(tree, layer, LIMITS)
}

fn apply_with(tree: &TempDir, layer: &[u8], limits: Limits) -> Result<Applied, LayerError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let owners = Owners::Real;
    apply(rustix::fs::open(tree.path(), flags, Mode::empty()).unwrap(), layer, limits, owners)
}

/// Applies layers to a new tree.
fn tree_of(layers: &[&[(&str, &str)]]) -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    for entries in layers {
        apply_to(&tree, &layer(entries)).unwrap();
    }
    tree
}

/// Lists a tree: names in order, with the content of files and the targets of links.
fn listed(tree: &TempDir) -> Vec<String> {
    fn list(directory: &Path, prefix: &str, lines: &mut Vec<String>) {
        let mut entries: Vec<_> = fs::read_dir(directory).unwrap().flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                lines.push(format!("{name}/"));
                list(&entry.path(), &format!("{name}/"), lines);
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).unwrap();
                lines.push(format!("{name} -> {}", target.display()));
            } else {
                lines.push(format!("{name}={}", fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }
    let mut lines = Vec::new();
    list(tree.path(), "", &mut lines);
    lines
}

#[test]
fn files_of_all_types_have_their_metadata() {
    let tree = tempfile::tempdir().unwrap();
    let entries =
        [("./", ""), ("d/", ""), ("d/f", "text"), ("d/l -> f", ""), ("h => d/f", ""), ("p !6", "")];
    let entries = [&entries[..], &[("null !3", ""), ("disk !4", "")]].concat();

    let applied = apply_to(&tree, &layer(&entries)).unwrap();

    assert_eq!(applied, Applied { entries: 8, bytes: 4, devices: 2, attributes: 0 });
    let of = |name: &str| fs::symlink_metadata(tree.path().join(name)).unwrap();
    for name in ["", "d", "d/f", "d/l", "p"] {
        assert_eq!(of(name).mtime(), 1_000_000_000, "{name}");
    }
    assert_eq!((of("d/f").mode() & 0o7777, of("d").mode() & 0o7777), (0o755, 0o755));
    assert_eq!((of("d/f").nlink(), of("d/f").ino()), (2, of("h").ino()));
    assert!(of("p").file_type().is_fifo());
    assert!(!tree.path().join("null").exists() && !tree.path().join("disk").exists());
}

#[test]
fn owner_setuid_and_attributes_are_set_in_an_order_that_keeps_them() {
    if !rustix::process::geteuid().is_root() {
        bhatti_testkit::skip("owners and capabilities of a layer", "only root can set them");
        return;
    }
    let mut builder = Builder::new(Vec::new());
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".as_slice();
    let long = [b'n'; 3000];
    let records = [
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.user.note", &long),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("uid", b"4000000000"),
        ("mtime", b"-1.5"),
    ];
    builder.append_pax_extensions(records).unwrap();
    let mut header = header("f", EntryType::Regular, 0);
    header.set_mode(0o104_755);
    header.set_cksum();
    builder.append(&header, io::empty()).unwrap();
    let tree = tempfile::tempdir().unwrap();

    let applied = apply_to(&tree, &builder.into_inner().unwrap()).unwrap();

    let file = tree.path().join("f");
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (4_000_000_000, 0o4755));
    assert_eq!(metadata.mtime(), -2);
    assert_eq!(applied.attributes, 1);
    let mut value = vec![0; 4000];
    let length = rustix::fs::getxattr(&file, "security.capability", &mut value).unwrap();
    assert_eq!(&value[..length], capability);
    let length = rustix::fs::getxattr(&file, "user.note", &mut value).unwrap();
    assert_eq!(&value[..length], long);
}

#[test]
fn whiteouts_remove_what_lower_layers_have_and_nothing_else() {
    let lower: &[(&str, &str)] =
        &[("a/", ""), ("a/x", "1"), ("a/y", "1"), ("a/d/", ""), ("a/d/z", "1"), ("b", "1")];
    for (upper, wanted) in [
        (&[("a/.wh.x", "")][..], &["a/", "a/d/", "a/d/z=1", "a/y=1", "b=1"][..]),
        (&[(".wh.a", "")], &["b=1"]),
        (&[(".wh.b", ""), (".wh.none", "")], &["a/", "a/d/", "a/d/z=1", "a/x=1", "a/y=1"]),
        // In one layer, a file and its whiteout may stand in any order.
        (&[(".wh.a", ""), ("a", "2")], &["a=2", "b=1"]),
        (&[("a", "2"), (".wh.a", "")], &["a=2", "b=1"]),
        (&[("a/n", "2"), ("a/.wh..wh..opq", "")], &["a/", "a/n=2", "b=1"]),
        (&[("a/.wh..wh..opq", ""), ("a/n", "2")], &["a/", "a/n=2", "b=1"]),
        (&[("a/d/n", "2"), ("a/.wh..wh..opq", "")], &["a/", "a/d/", "a/d/n=2", "b=1"]),
        (&[(".wh..wh..opq", ""), ("c", "2")], &["c=2"]),
        (
            &[(".wh..wh.plnk/", ""), (".wh..wh.aufs", "")],
            &["a/", "a/d/", "a/d/z=1", "a/x=1", "a/y=1", "b=1"],
        ),
    ] {
        assert_eq!(listed(&tree_of(&[lower, upper])), wanted, "{upper:?}");
    }
}

#[test]
fn files_replace_each_other_whatever_they_are() {
    let lower: &[(&str, &str)] = &[("d/", ""), ("d/x", "1"), ("f", "1"), ("l -> d", "")];
    for (upper, wanted) in [
        (&[("d", "2")][..], &["d=2", "f=1", "l -> d"][..]),
        (&[("f/", ""), ("f/x", "2")], &["d/", "d/x=1", "f/", "f/x=2", "l -> d"]),
        (&[("l", "2")], &["d/", "d/x=1", "f=1", "l=2"]),
        (&[("l/", "")], &["d/", "d/x=1", "f=1", "l/"]),
        (&[("d/", "")], &["d/", "d/x=1", "f=1", "l -> d"]),
        (&[("d -> f", "")], &["d -> f", "f=1", "l -> d"]),
        (&[("f => f", "")], &["d/", "d/x=1", "f=1", "l -> d"]),
        (&[("f => d/x", "")], &["d/", "d/x=1", "f=1", "l -> d"]),
        // A link to a directory is followed, inside of the tree.
        (&[("l/y", "2")], &["d/", "d/x=1", "d/y=2", "f=1", "l -> d"]),
        (&[("l/.wh.x", "")], &["d/", "f=1", "l -> d"]),
    ] {
        assert_eq!(listed(&tree_of(&[lower, upper])), wanted, "{upper:?}");
    }
}

#[test]
fn hard_link_keeps_its_content_when_its_first_name_is_removed() {
    let tree = tree_of(&[&[("a", "text"), ("b => a", "")], &[(".wh.a", "")], &[("c => b", "")]]);
    assert_eq!(listed(&tree), ["b=text", "c=text"]);
    assert_eq!(fs::metadata(tree.path().join("b")).unwrap().nlink(), 2);
}

#[test]
fn links_lead_to_places_inside_of_the_tree() {
    let outside = tempfile::tempdir().unwrap();
    let outside = outside.path().display();
    let link = format!("link -> {outside}");
    let inside = format!("{}/", outside.to_string().trim_start_matches('/'));
    let tree = tree_of(&[&[
        (&inside, ""),
        (&link, ""),
        ("link/file", "text"),
        ("up -> ../../../../..", ""),
        ("up/at-root", "text"),
    ]]);

    assert!(fs::read_dir(outside.to_string()).unwrap().next().is_none());
    assert_eq!(fs::read_to_string(tree.path().join(&inside).join("file")).unwrap(), "text");
    assert_eq!(fs::read_to_string(tree.path().join("at-root")).unwrap(), "text");
}

#[test]
fn hostile_entries_are_refused_by_name() {
    let long = format!("{}/x", "d".repeat(90));
    for (entries, wanted) in [
        (&[("../x", "")][..], "`../x`: the name leads out of the image"),
        (&[("a/../../x", "")], "`a/../../x`: the name leads out of the image"),
        (&[(".wh..", "")], "`.wh..`: the whiteout names no file"),
        (&[(".wh.", "")], "`.wh.`: the whiteout names no file"),
        (&[("a/.wh...", "")], "`a/.wh...`: the whiteout names no file"),
        (&[("./ !2", "")], "`./`: the root is not a directory"),
        (&[("l -> l", ""), ("l/x", "")], "`l/x`: its links form a loop"),
        (&[("l -> none", ""), ("l/x", "")], "`l/x`: its directory is a link to nothing"),
        (&[("f", ""), ("f/x", "")], "`f/x`: a file is where its directory should be"),
        (&[("d/", ""), ("h => d", "")], "`h`: it is a hard link to a directory"),
        (&[("h => none", "")], "`h`: the link's target does not exist"),
        (&[("h => ../x", "")], "`h`: the name leads out of the image"),
        (&[("l -> ", "")], "`l`: the link's target has no or too many bytes"),
        (&[("m !M", "")], "`m`: entries of type 'M' are not supported"),
        (&[(&long, ""), ("x !V", "")], "`x`: entries of type 'V' are not supported"),
    ] {
        let tree = tempfile::tempdir().unwrap();
        let error = apply_to(&tree, &layer(entries)).unwrap_err();
        assert_eq!(error.to_string(), wanted);
    }
}

#[test]
fn malformed_archives_are_refused() {
    let good = layer(&[("f", "text")]);
    let mut bad_sum = good.clone();
    bad_sum[0] = b'g';
    let cut = &good[..600];
    let text = b"not a tar archive, but text".repeat(40);
    for (archive, wanted) in [
        (&bad_sum[..], "a header's checksum is wrong: this is no tar archive"),
        (&text, "a header's checksum is wrong: this is no tar archive"),
        (&good[..100], "the archive cannot be read: unexpected end of file"),
        (cut, "the archive cannot be read: unexpected end of file"),
    ] {
        let tree = tempfile::tempdir().unwrap();
        assert_eq!(apply_to(&tree, archive).unwrap_err().to_string(), wanted);
    }
    // An archive may lack the blocks of zeros at its end.
    apply_to(&tempfile::tempdir().unwrap(), &good[..1024]).unwrap();
}

#[test]
fn limits_count_entries_and_bytes_with_holes() {
    let tree = tempfile::tempdir().unwrap();
    let two = layer(&[("a", "12345"), ("b", "12345")]);
    let of = |entries, bytes| apply_with(&tree, &two, Limits { entries, bytes });

    assert!(of(2, 10).is_ok());
    assert_eq!(of(1, 10).unwrap_err().to_string(), "the image has more than 1 files");
    let error = of(2, 9).unwrap_err().to_string();
    assert_eq!(error, "the image has more than 9 bytes in its files");

    let mut huge = header("huge", EntryType::Regular, 1 << 40);
    huge.set_cksum();
    let error = apply_to(&tree, huge.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("more than 1073741824 bytes"), "{error}");
    let mut extension = header("x", EntryType::XHeader, 1 << 30);
    extension.set_cksum();
    let error = apply_to(&tree, extension.as_bytes()).unwrap_err().to_string();
    assert_eq!(error, "an entry's name or attributes are too long");
}

#[test]
fn sparse_files_of_all_formats_keep_content_and_holes() {
    const SIZE: u64 = 8 << 20;
    let source = tempfile::tempdir().unwrap();
    let file = fs::File::create(source.path().join("sparse")).unwrap();
    file.set_len(SIZE).unwrap();
    // More segments than an old header holds.
    for at in (0..SIZE).step_by(256 << 10).skip(1) {
        std::os::unix::fs::FileExt::write_all_at(&file, &[b'x'; 5000], at).unwrap();
    }
    fs::write(source.path().join("after"), "text").unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ] {
        #[expect(clippy::disallowed_methods, reason = "a program that the test compares with")]
        let tar = std::process::Command::new("tar")
            .args(format)
            .args(["-S", "-c", "-C"])
            .arg(source.path())
            .args(["sparse", "after"])
            .output()
            .unwrap();
        let tree = tempfile::tempdir().unwrap();

        apply_to(&tree, &tar.stdout).unwrap();

        let made = tree.path().join("sparse");
        assert!(fs::read(&made).unwrap() == fs::read(source.path().join("sparse")).unwrap());
        assert!(fs::metadata(&made).unwrap().blocks() * 512 < SIZE / 4, "{format:?}");
        assert_eq!(fs::read_to_string(tree.path().join("after")).unwrap(), "text");
    }
}

#[test]
fn names_of_any_bytes_are_kept() {
    let mut builder = Builder::new(Vec::new());
    let long = "n".repeat(255);
    let names = [&b"invalid-\xff\xfe"[..], b"line\nfeed", long.as_bytes()];
    for name in names {
        use std::os::unix::ffi::OsStrExt;
        let mut header = header("", EntryType::Regular, 0);
        let path = Path::new(std::ffi::OsStr::from_bytes(name));
        builder.append_data(&mut header, path, io::empty()).unwrap();
    }
    let tree = tempfile::tempdir().unwrap();

    apply_to(&tree, &builder.into_inner().unwrap()).unwrap();

    let mut found: Vec<_> = fs::read_dir(tree.path())
        .unwrap()
        .map(|it| it.unwrap().file_name().into_encoded_bytes())
        .collect();
    found.sort();
    assert_eq!(found, names);
}
