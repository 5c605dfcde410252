//! Files: reading, writing, listing, changing, watching.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use bhatti_agent::{CallError, ReadOptions};
use bhatti_proto::{ErrorKind, FileEventKind, FrameType};
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT};

async fn write(agent: &Agent, path: &str, mode: &str, content: &[u8]) -> Result<(), CallError> {
    agent.client.write_file(path, mode, content.len() as u64, content).await
}

async fn read(agent: &Agent, path: &str, options: ReadOptions) -> Result<Vec<u8>, CallError> {
    let reading = async { agent.client.read_file(path, options).await?.read_to_end(1 << 30).await };
    timeout(LIMIT, reading).await.expect("the read ends")
}

async fn read_all(agent: &Agent, path: &str) -> Result<Vec<u8>, CallError> {
    read(agent, path, ReadOptions::default()).await
}

fn kind(error: &CallError) -> ErrorKind {
    match error {
        CallError::Agent(agent) => agent.kind,
        other => panic!("expected a refusal with a reason: {other}"),
    }
}

fn part(offset: u32, limit: u32, max_bytes: u64) -> ReadOptions {
    let some = |number: u32| Some(number).filter(|number| *number > 0);
    ReadOptions {
        offset: some(offset),
        limit: some(limit),
        max_bytes: Some(max_bytes).filter(|bytes| *bytes > 0),
    }
}

/// Returns the names in the test's directory.
fn names(agent: &Agent) -> Vec<String> {
    let entries = fs::read_dir(agent.path("")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn content_of_every_kind_and_size_survives() {
    let agent = Agent::start().await;
    let large: Vec<u8> = (0..10 << 20).map(|at: u32| (at % 251).to_le_bytes()[0]).collect();
    let all_bytes: Vec<u8> = (0..=255).collect();
    for (name, content) in
        [("empty", &b""[..]), ("text", b"hello\n"), ("bytes", &all_bytes), ("größe ☃", &large)]
    {
        let path = agent.path(name);

        write(&agent, &path, "0644", content).await.unwrap();

        assert!(read_all(&agent, &path).await.unwrap() == content, "{name}");
        assert!(fs::read(&path).unwrap() == content, "{name}");
    }
}

#[tokio::test]
async fn write_sets_the_exact_mode_and_creates_parents() {
    let agent = Agent::start().await;
    for (mode, bits) in
        [("0600", 0o600), ("0666", 0o666), ("0777", 0o777), ("4755", 0o4755), ("", 0o644)]
    {
        let path = agent.path(&format!("new/deep/{bits}"));

        write(&agent, &path, mode, b"x").await.unwrap();

        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, bits, "{mode}");
    }
    let refused = write(&agent, &agent.path("x"), "rw-r--r--", b"x").await.unwrap_err();
    assert_eq!(kind(&refused), ErrorKind::BadRequest);
}

#[tokio::test]
async fn overwriting_replaces_the_content_and_follows_links() {
    let agent = Agent::start().await;
    let (file, link, dangling) = (agent.path("file"), agent.path("link"), agent.path("dangling"));
    write(&agent, &file, "", b"much longer content").await.unwrap();
    symlink("file", &link).unwrap();
    symlink(agent.path("made"), &dangling).unwrap();

    write(&agent, &file, "", b"short").await.unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"short");
    write(&agent, &link, "", b"through the link").await.unwrap();
    write(&agent, &dangling, "", b"new").await.unwrap();

    assert_eq!(fs::read(&file).unwrap(), b"through the link");
    assert_eq!(fs::read(agent.path("made")).unwrap(), b"new");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(names(&agent).len(), 4);
    symlink("loop", agent.path("loop")).unwrap();
    let loops = write(&agent, &agent.path("loop"), "", b"").await.unwrap_err();
    assert_eq!(kind(&loops), ErrorKind::Other);
}

#[tokio::test]
async fn overwriting_keeps_mode_owner_attributes_and_other_names() {
    let agent = Agent::start().await;
    for mode in [0o755, 0o600, 0o4711, 0o444] {
        let path = agent.path(&format!("{mode:o}"));
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        if mode & 0o200 == 0 && !bhatti_testkit::is_root() {
            assert_eq!(
                kind(&write(&agent, &path, "", b"after").await.unwrap_err()),
                ErrorKind::PermissionDenied
            );
            continue;
        }

        write(&agent, &path, "", b"after").await.unwrap();

        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode, "{mode:o}");
        assert_eq!(fs::read(&path).unwrap(), b"after");
    }
    let (one, other) = (agent.path("one"), agent.path("other"));
    fs::write(&one, "before").unwrap();
    fs::hard_link(&one, &other).unwrap();
    set_attribute(&one, "user.kept", b"value");

    write(&agent, &one, "0640", b"after, and longer").await.unwrap();
    write(&agent, &one, "", b"short").await.unwrap();

    assert_eq!(fs::read(&other).unwrap(), b"short");
    assert_eq!(fs::metadata(&other).unwrap().mode() & 0o7777, 0o640);
    fs::remove_file(&other).unwrap();
    write(&agent, &one, "", b"alone").await.unwrap();
    assert_eq!(attribute(&one, "user.kept"), b"value");
}

fn set_attribute(path: &str, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

fn attribute(path: &str, name: &str) -> Vec<u8> {
    let mut value = vec![0; 4096];
    let length = rustix::fs::getxattr(path, name, &mut value[..]).unwrap();
    value.truncate(length);
    value
}

#[tokio::test]
async fn special_files_and_directories_are_not_overwritten() {
    let agent = Agent::start().await;
    let (fifo, socket) = (agent.path("fifo"), agent.path("socket"));
    assert!(bhatti_host::process::command("mkfifo").arg(&fifo).status().await.unwrap().success());
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::create_dir(agent.path("directory")).unwrap();
    symlink("fifo", agent.path("link")).unwrap();

    for (name, expected) in [
        ("fifo", ErrorKind::NotRegular),
        ("socket", ErrorKind::NotRegular),
        ("link", ErrorKind::NotRegular),
        ("directory", ErrorKind::IsDirectory),
        ("directory/..", ErrorKind::IsDirectory),
        ("fifo/below", ErrorKind::NotDirectory),
    ] {
        let refused = write(&agent, &agent.path(name), "", b"x").await.unwrap_err();
        assert_eq!(kind(&refused), expected, "{name}: {refused}");
    }
    assert_eq!(names(&agent).len(), 4);
}

#[tokio::test]
async fn failed_write_leaves_no_directories() {
    let agent = Agent::start().await;
    let mut upload =
        agent.client.begin_write(&agent.path("new/deep/file"), "", Some(100)).await.unwrap();
    upload.write(b"some").await.unwrap();
    let made = agent.path("new/deep");
    crate::agent::until("the directories exist", || fs::exists(&made).unwrap()).await;

    drop(upload);

    crate::agent::until("the directories are gone", || names(&agent).is_empty()).await;
}

/// Tests for root only: no other user may act as another one.
mod users {
    use super::*;

    /// The ids of a user without an entry in `/etc/passwd`, and of one of its groups.
    const USER: &str = "4242:4243";

    /// Starts an agent whose directory every user may enter. Returns `None` without root.
    async fn agent() -> Option<Agent> {
        if !bhatti_testkit::is_root() {
            bhatti_testkit::skip("file operations as another user", "this is not root");
            return None;
        }
        let agent = Agent::start().await;
        for path in [agent.directory.path(), &agent.directory.path().join("work")] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::create_dir(agent.path("home")).unwrap();
        std::os::unix::fs::chown(agent.path("home"), Some(4242), Some(4243)).unwrap();
        Some(agent)
    }

    fn owner(path: &str) -> (u32, u32) {
        let found = fs::symlink_metadata(path).unwrap();
        (found.uid(), found.gid())
    }

    #[tokio::test]
    async fn new_files_and_directories_belong_to_the_acting_user() {
        let Some(agent) = agent().await else { return };
        let user = agent.client.acting_as(Some(USER));
        let home = agent.path("home");

        user.write_file(&format!("{home}/a/b/file"), "", 1, &b"x"[..]).await.unwrap();
        user.make_directory(&format!("{home}/c/d"), "0700", true).await.unwrap();
        user.rename(&format!("{home}/a/b/file"), &format!("{home}/c/file")).await.unwrap();

        for made in ["a", "a/b", "c", "c/d", "c/file"] {
            assert_eq!(owner(&format!("{home}/{made}")), (4242, 4243), "{made}");
        }
        user.remove(&format!("{home}/a"), true).await.unwrap();
    }

    #[tokio::test]
    async fn access_is_checked_for_the_acting_user() {
        let Some(agent) = agent().await else { return };
        let user = agent.client.acting_as(Some(USER));
        let (secret, work) = (agent.path("secret"), agent.path("home/mine"));
        let locked = agent.path("locked");
        fs::create_dir(&locked).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&secret, "root's").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();

        let denied = [
            user.read_file(&secret, ReadOptions::default()).await.map(drop),
            user.write_file(&secret, "", 1, &b"x"[..]).await,
            user.write_file(&agent.path("new"), "", 1, &b"x"[..]).await,
            user.make_directory(&agent.path("directory"), "", false).await,
            user.remove(&secret, false).await,
            user.rename(&secret, &work).await,
            user.list_directory(&locked).await.map(drop),
            user.stat(&format!("{locked}/file")).await.map(drop),
        ];
        for refused in denied {
            assert_eq!(kind(&refused.unwrap_err()), ErrorKind::PermissionDenied);
        }

        let root = agent.client.acting_as(Some("root"));
        assert_eq!(
            root.read_file(&secret, ReadOptions::default())
                .await
                .unwrap()
                .read_to_end(100)
                .await
                .unwrap(),
            b"root's"
        );
        assert_eq!(owner(&secret), (0, 0));
    }

    #[tokio::test]
    async fn overwriting_by_root_keeps_the_owner() {
        let Some(agent) = agent().await else { return };
        let path = agent.path("home/file");
        fs::write(&path, "before").unwrap();
        std::os::unix::fs::chown(&path, Some(4242), Some(4243)).unwrap();
        set_attribute(&path, "user.kept", b"value");

        agent.client.acting_as(Some("root")).write_file(&path, "", 5, &b"after"[..]).await.unwrap();

        assert_eq!((owner(&path), fs::read(&path).unwrap()), ((4242, 4243), b"after".to_vec()));
        assert_eq!(attribute(&path, "user.kept"), b"value");
    }

    #[tokio::test]
    async fn file_that_cannot_be_replaced_is_written_in_place() {
        let Some(agent) = agent().await else { return };
        let user = agent.client.acting_as(Some(USER));
        let (foreign, mine) = (agent.path("home/foreign"), agent.path("mine"));
        for path in [&foreign, &mine] {
            fs::write(path, "content that is long").unwrap();
        }
        // One file is root's and writable by all, in the user's directory; the other is the
        // user's own, in root's directory.
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o666)).unwrap();
        std::os::unix::fs::chown(&mine, Some(4242), Some(4243)).unwrap();
        let inodes = [&foreign, &mine].map(|path| fs::metadata(path).unwrap().ino());

        for path in [&foreign, &mine] {
            user.write_file(path, "", 5, &b"short"[..]).await.unwrap();
        }

        assert_eq!([&foreign, &mine].map(|path| fs::metadata(path).unwrap().ino()), inodes);
        assert_eq!((owner(&foreign), owner(&mine)), ((0, 0), (4242, 4243)));
        for path in [&foreign, &mine] {
            assert_eq!(fs::read(path).unwrap(), b"short");
        }
        let refused = user.write_file(&foreign, "0600", 1, &b"x"[..]).await.unwrap_err();
        assert_eq!(kind(&refused), ErrorKind::PermissionDenied);
        assert_eq!(fs::read(&foreign).unwrap(), b"short");
    }

    #[tokio::test]
    async fn archives_use_the_rights_of_the_acting_user() {
        let Some(agent) = agent().await else { return };
        let user = agent.client.acting_as(Some(USER));
        fs::create_dir(agent.path("home/tree")).unwrap();
        fs::write(agent.path("home/tree/secret"), "root's").unwrap();
        fs::set_permissions(agent.path("home/tree/secret"), fs::Permissions::from_mode(0o600))
            .unwrap();

        let mut refused = user.read_archive(&agent.path("home/tree")).await.unwrap();
        let refused = refused.next().await.unwrap_err();
        assert_eq!(kind(&refused), ErrorKind::PermissionDenied);
        assert!(refused.to_string().contains("home/tree/secret"), "{refused}");

        let archive = crate::archives::archive(&[("new/deep/file", "content")]);
        crate::archives::unpack(&user, &agent.path("home"), &archive).await.unwrap();
        for made in ["home/new", "home/new/deep", "home/new/deep/file"] {
            assert_eq!(owner(&agent.path(made)), (4242, 4243), "{made}");
        }
        let refused = crate::archives::unpack(&user, &agent.path(""), &archive).await.unwrap_err();
        assert_eq!(kind(&refused), ErrorKind::PermissionDenied);
    }
}

#[tokio::test]
async fn wrong_number_of_bytes_leaves_the_file_unchanged() {
    let agent = Agent::start().await;
    let path = agent.path("file");
    write(&agent, &path, "", b"before").await.unwrap();

    let mut upload = agent.client.begin_write(&path, "", Some(3)).await.unwrap();
    drop(upload.write(b"12345").await);
    assert_eq!(kind(&upload.finish().await.unwrap_err()), ErrorKind::BadRequest);
    let mut upload = agent.client.begin_write(&path, "", Some(100)).await.unwrap();
    upload.write(b"some").await.unwrap();
    drop(upload);

    let cleaned = || names(&agent) == ["file"];
    crate::agent::until("temporary files are gone", cleaned).await;
    assert_eq!(fs::read(&path).unwrap(), b"before");
}

#[tokio::test]
async fn content_of_unknown_size_becomes_a_file_at_its_end() {
    let agent = Agent::start().await;
    let path = agent.path("file");
    let mut upload = agent.client.begin_write(&path, "0600", None).await.unwrap();
    upload.write(b"first ").await.unwrap();
    drop(upload);
    crate::agent::until("temporary files are gone", || names(&agent).is_empty()).await;

    let mut upload = agent.client.begin_write(&path, "0600", None).await.unwrap();
    upload.write(b"first ").await.unwrap();
    upload.write(b"second").await.unwrap();
    upload.end().await.unwrap();
    upload.finish().await.unwrap();

    assert_eq!(read_all(&agent, &path).await.unwrap(), b"first second");
}

#[tokio::test]
async fn writers_of_one_file_do_not_mix_and_readers_see_whole_files() {
    let agent = Agent::start().await;
    let path = agent.path("shared");
    write(&agent, &path, "", &[b'0'; 200_000]).await.unwrap();
    let writers: Vec<_> = (1..=5u8)
        .map(|digit| {
            let (client, path) = (agent.client.clone(), path.clone());
            tokio::spawn(async move {
                let content = vec![b'0' + digit; 200_000];
                for _ in 0..5 {
                    client.write_file(&path, "", content.len() as u64, &content[..]).await.unwrap();
                }
            })
        })
        .collect();

    for _ in 0..30 {
        let content = read_all(&agent, &path).await.unwrap();
        assert!(content.len() == 200_000 && content.iter().all(|byte| *byte == content[0]));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(names(&agent), ["shared"]);
}

#[tokio::test]
async fn partial_read_returns_the_files_own_bytes() {
    let agent = Agent::start().await;
    let path = agent.path("lines");
    let lines: String = (1..=100).map(|number| format!("line {number}\n")).collect();
    write(&agent, &path, "", lines.as_bytes()).await.unwrap();
    let between = |from: usize, to: usize| {
        (from..=to).map(|number| format!("line {number}\n")).collect::<String>()
    };

    let cases = [
        (part(0, 10, 0), between(1, 10)),
        (part(50, 0, 0), between(50, 100)),
        (part(50, 10, 0), between(50, 59)),
        (part(0, 0, 10), "line 1\nlin".to_owned()),
        (part(0, 3, 50_000), between(1, 3)),
        (part(0, 2000, 50), lines[..50].to_owned()),
        (part(101, 5, 0), String::new()),
        (part(1, 0, 0), lines.clone()),
    ];
    for (options, expected) in cases {
        let content = read(&agent, &path, options).await.unwrap();
        assert_eq!(String::from_utf8(content).unwrap(), expected, "{options:?}");
    }

    let odd = agent.path("odd");
    write(&agent, &odd, "", b"a\r\nb").await.unwrap();
    assert_eq!(read(&agent, &odd, part(0, 10, 0)).await.unwrap(), b"a\r\nb");
}

#[tokio::test]
async fn line_of_a_mebibyte_is_read() {
    let agent = Agent::start().await;
    let path = agent.path("long");
    let content = [b"first\n".to_vec(), vec![b'x'; 1 << 20], b"\nlast\n".to_vec()].concat();
    write(&agent, &path, "", &content).await.unwrap();

    assert!(read(&agent, &path, part(0, 10, 0)).await.unwrap() == content);
    assert_eq!(read(&agent, &path, part(3, 1, 0)).await.unwrap(), b"last\n");
}

#[tokio::test]
async fn hundred_thousand_lines_are_read_in_part() {
    let agent = Agent::start().await;
    let path = agent.path("many");
    let lines: String = (1..=100_000).map(|number| format!("line {number}\n")).collect();
    write(&agent, &path, "", lines.as_bytes()).await.unwrap();

    let content = read(&agent, &path, part(0, 2000, 0)).await.unwrap();

    assert_eq!(content.len(), 18_893);
    assert!(content.ends_with(b"line 2000\n"));
}

#[tokio::test]
async fn read_of_anything_but_a_regular_file_is_refused_at_once() {
    let agent = Agent::start().await;
    let (fifo, socket) = (agent.path("fifo"), agent.path("socket"));
    assert!(bhatti_host::process::command("mkfifo").arg(&fifo).status().await.unwrap().success());
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let cases = [
        (fifo.as_str(), ErrorKind::NotRegular),
        (&socket, ErrorKind::NotRegular),
        ("/dev/null", ErrorKind::NotRegular),
        ("/tmp", ErrorKind::IsDirectory),
        ("/nope/x", ErrorKind::NotFound),
        ("", ErrorKind::BadRequest),
        ("a\0b", ErrorKind::BadRequest),
    ];

    for (path, expected) in cases {
        assert_eq!(kind(&read_all(&agent, path).await.unwrap_err()), expected, "{path:?}");
    }
    let too_long = "x".repeat(4097);
    assert_eq!(kind(&read_all(&agent, &too_long).await.unwrap_err()), ErrorKind::BadRequest);
    let below_a_file = write(&agent, "/etc/passwd/x", "", b"").await.unwrap_err();
    assert_eq!(kind(&below_a_file), ErrorKind::NotDirectory);
}

#[tokio::test]
async fn stat_reports_files_directories_and_links() {
    let agent = Agent::start().await;
    let (file, link) = (agent.path("file"), agent.path("link"));
    write(&agent, &file, "0640", b"1234567").await.unwrap();
    symlink("file", &link).unwrap();

    let info = agent.client.stat(&file).await.unwrap();
    assert_eq!((&*info.name, info.size, &*info.mode, info.is_dir), ("file", 7, "0640", false));
    assert!(info.mtime > 1_700_000_000 && info.symlink_target.is_none());
    let info = agent.client.stat(&link).await.unwrap();
    assert_eq!((&*info.name, info.size, info.symlink_target.as_deref()), ("link", 7, Some("file")));
    let info = agent.client.stat("/tmp/").await.unwrap();
    assert_eq!((&*info.name, &*info.mode, info.is_dir), ("tmp", "1777", true));
    assert_eq!(kind(&agent.client.stat("/nope").await.unwrap_err()), ErrorKind::NotFound);
}

#[tokio::test]
async fn listing_has_every_entry_in_order() {
    let agent = Agent::start().await;
    // In memory: ten thousand new names can make a disk's journal wait for seconds.
    let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let directory = in_memory.path().to_str().unwrap().to_owned();
    assert_eq!(agent.client.list_directory(&directory).await.unwrap(), []);
    let mut expected: Vec<String> =
        (0..10_500).map(|number| format!("{}{number}", "n".repeat(60))).collect();
    for name in &expected {
        fs::write(format!("{directory}/{name}"), "").unwrap();
    }
    expected.sort();

    let listed = agent.client.list_directory(&directory).await.unwrap();

    assert!(listed.iter().map(|info| &info.name).eq(&expected));
    assert_eq!(
        kind(&agent.client.list_directory("/etc/passwd").await.unwrap_err()),
        ErrorKind::NotDirectory
    );
    assert_eq!(kind(&agent.client.list_directory("/nope").await.unwrap_err()), ErrorKind::NotFound);
    // An old host gets one frame, with the true total.
    let mut raw = agent.raw().await;
    raw.send(FrameType::FILE_LS_REQ, &format!(r#"{{"path":"{directory}"}}"#)).await;
    let frame = raw.next().await.unwrap();
    let entries: Vec<bhatti_proto::FileInfo> = frame.json().unwrap();
    let last = &entries[entries.len() - 1].name;
    assert_eq!(*last, format!("... truncated at {} entries (10500 total)", entries.len() - 1));
}

#[tokio::test]
async fn directories_are_created_renamed_and_removed() {
    let agent = Agent::start().await;
    let (one, deep, other) = (agent.path("one"), agent.path("one/two/three"), agent.path("other"));

    agent.client.make_directory(&one, "0700", false).await.unwrap();
    assert_eq!(fs::metadata(&one).unwrap().permissions().mode() & 0o7777, 0o700);
    let exists = agent.client.make_directory(&one, "", false).await.unwrap_err();
    assert_eq!(kind(&exists), ErrorKind::AlreadyExists);
    agent.client.make_directory(&deep, "", true).await.unwrap();
    agent.client.make_directory(&deep, "", true).await.unwrap();
    write(&agent, &format!("{deep}/file"), "", b"x").await.unwrap();

    agent.client.rename(&one, &other).await.unwrap();
    assert!(fs::exists(format!("{other}/two/three/file")).unwrap());
    let full = agent.client.remove(&other, false).await.unwrap_err();
    assert_eq!(kind(&full), ErrorKind::NotEmpty);
    agent.client.remove(&other, true).await.unwrap();
    assert_eq!(names(&agent), Vec::<String>::new());
    assert_eq!(kind(&agent.client.remove(&other, true).await.unwrap_err()), ErrorKind::NotFound);
    assert_eq!(kind(&agent.client.rename(&one, &other).await.unwrap_err()), ErrorKind::NotFound);
}

#[tokio::test]
async fn removing_a_link_keeps_its_target() {
    let agent = Agent::start().await;
    let (directory, link) = (agent.path("directory"), agent.path("link"));
    fs::create_dir(&directory).unwrap();
    fs::write(agent.path("directory/file"), "").unwrap();
    symlink(&directory, &link).unwrap();

    agent.client.remove(&link, true).await.unwrap();

    assert!(fs::exists(agent.path("directory/file")).unwrap() && !fs::exists(&link).unwrap());
}

#[tokio::test]
async fn watch_reports_changes_after_its_first_event() {
    let agent = Agent::start().await;
    fs::create_dir(agent.path("watched")).unwrap();
    let mut events = agent.client.watch(&agent.path("watched")).await.unwrap();
    let mut next = async || timeout(LIMIT, events.next()).await.unwrap().unwrap();
    assert_eq!(next().await.unwrap().kind, FileEventKind::Watching);

    fs::write(agent.path("watched/a"), "content").unwrap();
    let created = next().await.unwrap();
    assert_eq!((created.kind, created.name.as_deref()), (FileEventKind::Created, Some("a")));
    assert_eq!(next().await.unwrap().kind, FileEventKind::Modified);
    fs::remove_file(agent.path("watched/a")).unwrap();
    loop {
        let event = next().await.unwrap();
        if event.kind == FileEventKind::Removed {
            assert_eq!(event.name.as_deref(), Some("a"));
            break;
        }
    }
    fs::remove_dir(agent.path("watched")).unwrap();
    while next().await.is_some() {}
    let missing = agent.client.watch("/nope").await.unwrap().next().await.unwrap_err();
    assert_eq!(kind(&missing), ErrorKind::NotFound);
}

#[tokio::test]
async fn dropped_read_ends_and_the_agent_goes_on() {
    let agent = Agent::start().await;
    let path = agent.path("large");
    fs::File::create(&path).unwrap().set_len(10 << 30).unwrap();
    let mut content = agent.client.read_file(&path, ReadOptions::default()).await.unwrap();
    content.next().await.unwrap();

    drop(content);

    let answered =
        timeout(Duration::from_secs(5), agent.client.stat(&path)).await.unwrap().unwrap();
    assert_eq!(answered.size, 10 << 30);
}

#[tokio::test]
async fn lines_of_a_sparse_file_are_skipped_without_reading_its_holes() {
    let agent = Agent::start().await;
    let path = agent.path("sparse");
    fs::File::create(&path).unwrap().set_len(8 << 40).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_at(&file, b"\nlast\n", (8 << 40) - 6).unwrap();

    assert_eq!(read(&agent, &path, part(2, 0, 0)).await.unwrap(), b"last\n");
    assert_eq!(read(&agent, &path, part(9, 0, 0)).await.unwrap(), b"");
}

#[tokio::test]
async fn read_of_a_blocking_kernel_file_ends() {
    let agent = Agent::start().await;
    // Only root may read the file, and only if the kernel permits it.
    match agent.client.read_file("/proc/kmsg", ReadOptions::default()).await {
        Ok(content) => drop(timeout(LIMIT, content.read_to_end(1 << 30)).await.unwrap()),
        Err(error) => assert_eq!(kind(&error), ErrorKind::PermissionDenied),
    }
    assert_eq!(agent.run_shell("echo here").await.stdout(), "here\n");
}

#[tokio::test]
async fn file_operations_are_limited_and_do_not_block_the_agent() {
    let agent = Agent::start_with(r#"{"file_operations": 2, "file_wait_ms": 50}"#).await;
    let path = agent.path("large");
    fs::File::create(&path).unwrap().set_len(10 << 30).unwrap();
    let mut waiting = Vec::new();
    for _ in 0..2 {
        // The rest is never read, so each read occupies its thread.
        let mut content = agent.client.read_file(&path, ReadOptions::default()).await.unwrap();
        content.next().await.unwrap();
        waiting.push(content);
    }

    let refused = agent.client.stat(&path).await.unwrap_err();
    assert_eq!(kind(&refused), ErrorKind::Limit);
    assert_eq!(agent.run_shell("echo here").await.stdout(), "here\n");
    drop(waiting);
    let stat = async || agent.client.stat(&path).await.is_ok();
    timeout(LIMIT, async { while !stat().await {} }).await.unwrap();
}

#[tokio::test]
async fn long_listing_takes_bounded_memory_in_the_agent() {
    let agent = Agent::start().await;
    let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let target = "x".repeat(4000);
    for number in 0..20_000 {
        symlink(&target, in_memory.path().join(number.to_string())).unwrap();
    }
    let before = bhatti_testkit::resident_mib(agent.process.id().unwrap());

    let directory = in_memory.path().to_str().unwrap();
    let refused = timeout(LIMIT, agent.client.list_directory(directory)).await.unwrap();

    assert!(matches!(refused.unwrap_err(), CallError::TooMuch { .. }));
    let grown = bhatti_testkit::resident_mib(agent.process.id().unwrap()) - before;
    assert!(grown < 16, "{grown} MiB for a listing of 80 MiB");
}

#[tokio::test]
async fn written_script_runs_at_once_after_each_change() {
    let agent = Agent::start().await;
    let path = agent.path("script");
    for number in 0..10 {
        write(&agent, &path, "0755", format!("#!/bin/sh\necho {number}\n").as_bytes())
            .await
            .unwrap();

        assert_eq!(agent.run(&[&path]).await.unwrap().stdout(), format!("{number}\n"));
    }
}
