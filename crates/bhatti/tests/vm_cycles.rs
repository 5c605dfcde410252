//! Many lives of sandboxes leave nothing behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::Path;

use bhatti_api::CreateSandbox;
use bhatti_client::{Client, CommandEvent};
use bhatti_testkit::{Feature, TestDaemon, engine_has, wait_for};

/// Open files of a process.
fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Files and directories below a directory, except what only ever grows: the log and the store's own files.
fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        }
        found.push(name);
    }
    found.sort();
    found
}

/// Processes whose command line holds `text`.
fn processes_with(text: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(text)).count()
}

async fn cycle(client: &Client) {
    let sandbox = client.create(&CreateSandbox::default()).await.unwrap();
    let start = bhatti_testkit::start(&["true"]);
    let (_input, mut output) = client.start_command(&sandbox.id, &start).await.unwrap();
    assert_eq!(output.next().await.unwrap(), CommandEvent::Exit(0));
    client.destroy(&sandbox.id).await.unwrap();
}

#[tokio::test]
async fn fifty_lives_leave_no_process_file_or_descriptor() {
    let daemon = TestDaemon::start().await;
    // The first life opens what stays open: the store's files, for one.
    cycle(&daemon.client).await;
    let data_dir = daemon.data_dir().to_string_lossy().into_owned();
    let expected = if engine_has(Feature::SavedMemory) { 1 } else { 0 };
    wait_for("a VM ahead of demand", || daemon.all_vmm_pids().len() == expected).await;
    // A VMM in a jail names no file of the daemon's; others may that are no VMMs.
    let now =
        || (files(daemon.data_dir()).len(), daemon.all_vmm_pids().len(), processes_with(&data_dir));
    let before = now();
    let descriptors = open_files(daemon.pid());

    let workers = (0..2).map(|_| {
        let client = daemon.client.clone();
        tokio::spawn(async move {
            for _ in 0..25 {
                cycle(&client).await;
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }

    // The VM ahead of demand may have been on its way before: it has a few. Fifty lives that left one each would be more.
    wait_for("closed descriptors", || open_files(daemon.pid()) <= descriptors + 10).await;
    // One VM waits for the next life, as one did before.
    wait_for("the files and processes of before", || now() == before).await;
}
