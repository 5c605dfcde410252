//! Directories as archives.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use bhatti_agent::{AgentClient, CallError};
use bhatti_proto::ErrorKind;
use tar::{Builder, EntryType, Header};
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT};

/// Builds an archive of these files.
pub(crate) fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o640);
        header.set_mtime(1_700_000_000);
        archive.append_data(&mut header, name, content.as_bytes()).unwrap();
    }
    archive.into_inner().unwrap()
}

/// Renames an entry of an archive, to a name that no honest archive has.
fn renamed(archive: &[u8], from: &str, to: &str) -> Vec<u8> {
    let mut archive = archive.to_vec();
    for block in archive.chunks_mut(512).filter(|block| block.starts_with(from.as_bytes())) {
        block[..to.len()].copy_from_slice(to.as_bytes());
        let mut header = Header::from_byte_slice(block).clone();
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
    }
    archive
}

/// Unpacks an archive, and returns the skipped entries.
pub(crate) async fn unpack(
    client: &AgentClient,
    path: &str,
    archive: &[u8],
) -> Result<Vec<String>, CallError> {
    let mut upload = client.write_archive(path).await?;
    for piece in archive.chunks(100_000) {
        if upload.write(piece).await.is_err() {
            break;
        }
    }
    drop(upload.end().await);
    timeout(LIMIT, upload.finish()).await.expect("the archive is unpacked in time")
}

/// Reads a directory as an archive, and returns the skipped entries with it.
async fn pack(agent: &Agent, path: &str) -> Result<(Vec<u8>, Vec<String>), CallError> {
    let mut content = agent.client.read_archive(path).await?;
    let mut archive = Vec::new();
    while let Some(piece) = timeout(LIMIT, content.next()).await.expect("a piece arrives")? {
        archive.extend_from_slice(&piece);
    }
    Ok((archive, content.skipped().to_vec()))
}

fn kind(error: &CallError) -> ErrorKind {
    match error {
        CallError::Agent(agent) => agent.kind,
        other => panic!("expected a refusal with a reason: {other}"),
    }
}

/// Creates a tree with every kind of entry.
fn make_tree(agent: &Agent) {
    let at = |name: &str| agent.path(&format!("tree/{name}"));
    fs::create_dir_all(at("empty")).unwrap();
    fs::create_dir_all(at(&"deep/".repeat(30))).unwrap();
    fs::write(at("large"), vec![7; 300_000]).unwrap();
    fs::write(at(&"n".repeat(200)), "long name").unwrap();
    fs::write(at("script"), "#!/bin/sh").unwrap();
    fs::set_permissions(at("script"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::hard_link(at("script"), at("same")).unwrap();
    symlink("script", at("link")).unwrap();
    symlink("/nowhere", at("dangling")).unwrap();
    drop(UnixListener::bind(at("socket")).unwrap());
}

#[tokio::test]
async fn tree_is_copied_whole_without_its_socket() {
    let agent = Agent::start().await;
    make_tree(&agent);

    let (archive, skipped) = pack(&agent, &agent.path("tree")).await.unwrap();
    assert_eq!(skipped, [agent.path("tree/socket")]);
    for _ in 0..2 {
        // The second time, unpack over the existing tree.
        let left_out = unpack(&agent.client, &agent.path("copy/of"), &archive).await.unwrap();
        assert_eq!(left_out, Vec::<String>::new());
    }

    let at = |name: &str| agent.path(&format!("copy/of/{name}"));
    assert!(fs::read(at("large")).unwrap() == vec![7; 300_000]);
    assert_eq!(fs::read(at(&"n".repeat(200))).unwrap(), b"long name");
    assert!(fs::metadata(at("empty")).unwrap().is_dir());
    assert!(fs::metadata(at(&"deep/".repeat(30))).unwrap().is_dir());
    let script = fs::metadata(at("script")).unwrap();
    assert_eq!(
        (script.mode() & 0o7777, script.ino()),
        (0o755, fs::metadata(at("same")).unwrap().ino())
    );
    assert_eq!(fs::read_link(at("link")).unwrap().to_str(), Some("script"));
    assert_eq!(fs::read_link(at("dangling")).unwrap().to_str(), Some("/nowhere"));
}

#[tokio::test]
async fn archive_is_readable_by_tar() {
    let agent = Agent::start().await;
    make_tree(&agent);
    let (archive, _skipped) = pack(&agent, &agent.path("tree")).await.unwrap();
    fs::write(agent.path("archive.tar"), archive).unwrap();
    fs::create_dir(agent.path("unpacked")).unwrap();

    agent.run(&["tar", "-xf", "archive.tar", "-C", "unpacked"]).await.unwrap();

    let differs = agent.run_shell("diff -r --no-dereference tree unpacked").await;
    assert_eq!(differs.stdout(), "Only in tree: socket\n");
}

#[tokio::test]
async fn unpacking_keeps_other_files_and_directory_modes() {
    let agent = Agent::start().await;
    fs::create_dir_all(agent.path("place/private")).unwrap();
    fs::set_permissions(agent.path("place/private"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(agent.path("place/other"), "stays").unwrap();
    fs::write(agent.path("target"), "stays").unwrap();
    symlink("../target", agent.path("place/link")).unwrap();
    let files = [("private/file", "new"), ("link", "a file now"), ("_absolute", "below")];

    let archive = renamed(&archive(&files), "_absolute", "/absolute");
    unpack(&agent.client, &agent.path("place"), &archive).await.unwrap();

    assert_eq!(fs::metadata(agent.path("place/private")).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(agent.path("place/private/file")).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(fs::metadata(agent.path("place/absolute")).unwrap().mtime(), 1_700_000_000);
    for (name, content) in [("other", "stays"), ("link", "a file now"), ("absolute", "below")] {
        assert_eq!(fs::read_to_string(agent.path(&format!("place/{name}"))).unwrap(), content);
    }
    assert_eq!(fs::read_to_string(agent.path("target")).unwrap(), "stays");
}

#[tokio::test]
async fn bad_archives_are_refused_with_a_reason() {
    let agent = Agent::start().await;
    let place = agent.path("place");
    let whole = archive(&[("file", &"x".repeat(5000))]);
    let outside = renamed(&whole, "file", "../file");
    let mut long_name = Header::new_gnu();
    long_name.set_entry_type(EntryType::GNULongName);
    long_name.set_size(1 << 40);
    long_name.set_cksum();
    let mut endless = long_name.as_bytes().to_vec();
    endless.resize(4 << 20, b'n');

    for (archive, reason) in [
        (&whole[..3000], "broke off"),
        (&outside[..], "outside"),
        (&[1; 2048][..], "not a tar archive"),
        (&endless[..], "header"),
    ] {
        let refused = unpack(&agent.client, &place, archive).await.unwrap_err();
        assert!(refused.to_string().contains(reason), "{refused}");
    }
    assert!(!fs::exists(agent.path("file")).unwrap());
    assert!(bhatti_testkit::resident_mib(agent.process.id().unwrap()) < 64);
    let file = agent.path("a file");
    fs::write(&file, "").unwrap();
    for missing in [agent.path("missing"), file] {
        let mut content = agent.client.read_archive(&missing).await.unwrap();
        let refused = content.next().await.unwrap_err();
        assert!(
            matches!(kind(&refused), ErrorKind::NotFound | ErrorKind::NotDirectory),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn dropped_archive_ends_and_the_agent_goes_on() {
    let agent = Agent::start_with(r#"{"file_operations": 1}"#).await;
    fs::create_dir(agent.path("tree")).unwrap();
    fs::File::create(agent.path("tree/large")).unwrap().set_len(10 << 30).unwrap();
    let mut content = agent.client.read_archive(&agent.path("tree")).await.unwrap();
    content.next().await.unwrap();

    drop(content);
    let mut upload = agent.client.write_archive(&agent.path("place")).await.unwrap();
    upload.write(&archive(&[("file", "content")])[..700]).await.unwrap();
    drop(upload);

    agent.client.stat(&agent.path("tree")).await.unwrap();
}
