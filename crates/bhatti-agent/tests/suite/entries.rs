//! Files with all attributes, writes in place, and watches of trees.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use bhatti_agent::{CallError, TreeEvent, TreeEvents};
use bhatti_proto::{AgentError, EntryKind, ErrorKind, FileEventKind, InPlace};
use tokio::time::timeout;

use crate::agent::{Agent, LIMIT};

fn own() -> String {
    format!("{}:{}", rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
}

async fn write(agent: &Agent, path: &str, content: &[u8], how: InPlace) -> Result<(), CallError> {
    let mut upload = agent.client.begin_write_in_place(path, how).await?;
    upload.write(content).await?;
    upload.end().await?;
    upload.finish().await
}

/// Returns the changes so far.
async fn changes(events: &mut TreeEvents) -> Vec<(FileEventKind, String)> {
    events.sync().await.unwrap();
    let mut all = Vec::new();
    loop {
        match timeout(LIMIT, events.next()).await.unwrap().unwrap() {
            TreeEvent::Change(event) => all.push((event.kind, event.name.unwrap_or_default())),
            TreeEvent::Synced => return all,
            TreeEvent::Over => panic!("the watch is over after {all:?}"),
        }
    }
}

#[tokio::test]
async fn file_is_written_in_place_with_its_attributes() {
    let agent = Agent::start().await;
    let place = tempfile::tempdir_in(".").unwrap();
    let directory = place.path().canonicalize().unwrap();
    let (path, other) = (directory.join("new/file"), directory.join("other"));
    let name = path.to_str().unwrap();
    let with = |key: &str| InPlace {
        owner: own(),
        attributes: BTreeMap::from([(format!("e2b.{key}"), "value".to_owned())]),
        prefix: Some("e2b.".to_owned()),
    };

    write(&agent, name, b"a long first text", with("one")).await.unwrap();
    fs::hard_link(&path, &other).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    write(&agent, name, b"short", with("two")).await.unwrap();

    assert_eq!(fs::read(&other).unwrap(), b"short", "the other name leads to the same file");
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    let entry = agent.client.entry(name, None).await.unwrap();
    assert_eq!((entry.kind, entry.size, entry.mode), (EntryKind::File, 5, 0o644));
    assert_eq!(entry.attributes, BTreeMap::from([("e2b.two".to_owned(), "value".to_owned())]));
    let refused = write(&agent, directory.to_str().unwrap(), b"x", with("x")).await.unwrap_err();
    let is_directory = |error: &AgentError| error.kind == ErrorKind::IsDirectory;
    assert!(matches!(&refused, CallError::Agent(error) if is_directory(error)), "{refused}");
}

#[tokio::test]
async fn paths_begin_at_the_home_of_their_user() {
    let agent = Agent::start().await;
    let place = async |path: &str| agent.client.place(path, Some("root")).await.unwrap().path;

    assert_eq!(place("~/a/../b").await, "/root/b");
    assert_eq!(place("a").await, "/root/a");
    assert_eq!(place("").await, "/root");
    assert_eq!(place("/x/./y").await, "/x/y");
    let refused = agent.client.place("~other/x", None).await.unwrap_err();
    assert!(matches!(refused, CallError::Agent(error) if error.kind == ErrorKind::BadRequest));
    let refused = agent.client.place("x", Some("missing-user")).await.unwrap_err();
    assert!(matches!(refused, CallError::Agent(error) if error.kind == ErrorKind::NoSuchUser));
}

#[tokio::test]
async fn tree_watch_reports_each_kind_of_change_also_in_new_directories() {
    use FileEventKind::{Attributes, Created, Modified, Moved, Removed};
    let agent = Agent::start().await;
    let place = tempfile::tempdir_in(".").unwrap();
    let top = place.path().canonicalize().unwrap();
    let mut events = agent.client.watch_tree(top.to_str().unwrap(), true).await.unwrap();
    let owned = |changes: &[(FileEventKind, &str)]| {
        changes.iter().map(|(kind, name)| (*kind, (*name).to_owned())).collect::<Vec<_>>()
    };

    let how = InPlace { owner: own(), ..InPlace::default() };
    write(&agent, top.join("a").to_str().unwrap(), b"text", how).await.unwrap();
    let three = owned(&[(Created, "a"), (Attributes, "a"), (Modified, "a")]);
    assert_eq!(changes(&mut events).await, three);

    fs::create_dir(top.join("d")).unwrap();
    assert_eq!(changes(&mut events).await, owned(&[(Created, "d")]));
    fs::rename(top.join("a"), top.join("d/b")).unwrap();
    assert_eq!(changes(&mut events).await, owned(&[(Moved, "a"), (Created, "d/b")]));
    fs::remove_dir_all(top.join("d")).unwrap();
    assert_eq!(changes(&mut events).await, owned(&[(Removed, "d/b"), (Removed, "d")]));

    fs::create_dir_all(top.join("x/y/z")).unwrap();
    fs::write(top.join("x/y/z/file"), "").unwrap();
    let made = changes(&mut events).await;
    for name in ["x", "x/y", "x/y/z", "x/y/z/file"] {
        assert!(made.contains(&(Created, name.to_owned())), "{name}: {made:?}");
    }
    fs::rename(top.join("x"), top.join("w")).unwrap();
    changes(&mut events).await;
    fs::write(top.join("w/y/late"), "").unwrap();
    assert_eq!(changes(&mut events).await[0], (Created, "w/y/late".to_owned()));

    // The events of a directory that was moved away come after the move.
    fs::create_dir_all(top.join("m/sub")).unwrap();
    changes(&mut events).await;
    fs::rename(top.join("m"), top.join("n")).unwrap();
    fs::rename(top.join("n/sub"), top.join("n/sub2")).unwrap();
    changes(&mut events).await;
    fs::write(top.join("n/sub2/after"), "").unwrap();
    let after = changes(&mut events).await;
    assert!(after.contains(&(Created, "n/sub2/after".to_owned())), "{after:?}");

    drop(place);
    let over = async { while events.next().await.unwrap() != TreeEvent::Over {} };
    timeout(LIMIT, over).await.unwrap();
}

#[tokio::test]
async fn a_thousand_changes_are_reported_in_order() {
    let agent = Agent::start().await;
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut events = agent.client.watch_tree(place.path().to_str().unwrap(), false).await.unwrap();

    for number in 0..1000 {
        fs::create_dir(place.path().join(format!("{number:04}"))).unwrap();
    }

    let names: Vec<_> = changes(&mut events).await.into_iter().map(|(_, name)| name).collect();
    let expected: Vec<_> = (0..1000).map(|number| format!("{number:04}")).collect();
    assert!(names == expected, "{} changes", names.len());
}
