//! Recovery on a rebuilt disk, and the state that the daemon finds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::daemon::Daemon;

/// Directories of the data directory that have an entry for each sandbox, snapshot or volume.
const KINDS: [&str; 3] = ["sandboxes", "snapshots", "volumes"];

/// Script that prints a file's content from the guest's page cache, and from the disk.
const READ_BOTH: &str = "cat $HOME/f; dd if=$HOME/f iflag=direct bs=4096 count=1 2>/dev/null";

/// The state that was found on a rebuilt disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Seen {
    /// Why the disk could not be examined, if so.
    pub(super) unusable: Option<String>,
    /// The state of each subject, `KIND:NAME`.
    pub(super) states: BTreeMap<String, String>,
    /// How each sandbox's start ended: `ok`, `cold only: WHY` or `no: WHY`.
    pub(super) starts: BTreeMap<String, String>,
    /// Entries that recovery removed, as paths below the data directory.
    pub(super) removed: Vec<String>,
    /// Top layers of disks that are not qcow2 files.
    pub(super) unreadable: Vec<String>,
    /// Entries that no row has and that the daemon's log does not name.
    pub(super) unreported: Vec<String>,
    /// Outcome and data of the sandboxes' starts, by the state of their files.
    pub(super) tried: BTreeMap<String, (String, String)>,
    /// Warnings and errors of the daemon.
    pub(super) log: Vec<String>,
}

/// Recovers `WORK/point` and writes the state that was found to `WORK/seen.json`.
///
/// `WORK/keys.json` has all API keys that each user ever had, `WORK/tried.json` the starts that
/// need not be tried again.
pub(super) fn look(work: &Path, start: bool) -> Result<()> {
    let seen = match recover(work, start) {
        Ok(seen) => seen,
        Err(error) => Seen { unusable: Some(format!("{error:#}")), ..Seen::default() },
    };
    fs::write(work.join("seen.json"), serde_json::to_vec(&seen)?)?;
    Ok(())
}

fn recover(work: &Path, start: bool) -> Result<Seen> {
    let keys: BTreeMap<String, Vec<String>> = read_json(&work.join("keys.json"))?;
    let tried: BTreeMap<String, (String, String)> = read_json(&work.join("tried.json"))?;
    let mut daemon = Daemon::on(&work.join("point"), work)?;
    let data = daemon.data.clone();
    let log = work.join("point.log");
    let mut seen = Seen { unreadable: unreadable_layers(&data)?, ..Seen::default() };
    let (before, prints) = (entries(&data)?, fingerprints(&data)?);
    daemon.start(&log)?;
    let after = entries(&data)?;
    read_rows(&daemon, &keys, &mut seen)?;
    let mut ids = Vec::new();
    for row in daemon.list(&["list"])? {
        let (name, id) = (string(&row, "name"), string(&row, "id"));
        let status = string(&row, "status");
        let shape = format!("{status} {}", prints.get(&id).map_or("", String::as_str));
        seen.states.insert(format!("sandbox:{name}"), status);
        ids.push(id);
        if start {
            let known = tried.get(&shape).cloned();
            let (outcome, data) = known.map_or_else(|| start_and_read(&daemon, &name), Ok)?;
            seen.tried.insert(shape, (outcome.clone(), data.clone()));
            seen.starts.insert(name.clone(), outcome);
            seen.states.insert(format!("data:{name}"), data);
        }
    }
    for kind in ["snapshot", "volume"] {
        ids.extend(daemon.list(&[kind, "list"])?.iter().map(|row| string(row, "id")));
    }
    let printed = fs::read_to_string(&log)?;
    seen.removed = before
        .iter()
        .filter(|entry| !after.iter().any(|it| is_of(it, id_in(entry))))
        .cloned()
        .collect();
    let unknown = after.iter().filter(|entry| !ids.iter().any(|id| is_of(entry, id)));
    let is_spare = |entry: &str| data.join(entry).join("spare").exists();
    seen.unreported = unknown
        .filter(|entry| {
            !is_spare(entry) && data.join(entry).exists() && !printed.contains(id_in(entry))
        })
        .cloned()
        .collect();
    seen.log = printed
        .lines()
        .filter(|line| line.contains(" WARN ") || line.contains(" ERROR "))
        .map(str::to_owned)
        .collect();
    Ok(seen)
}

/// Reads the rows of users with their valid keys, secrets, volumes and snapshots.
fn read_rows(daemon: &Daemon, keys: &BTreeMap<String, Vec<String>>, seen: &mut Seen) -> Result<()> {
    for kind in ["user", "secret", "volume", "snapshot"] {
        for row in daemon.list(&[kind, "list"])? {
            let name = string(&row, "name");
            let files = daemon.data.join(format!("{kind}s")).join(string(&row, "id"));
            let mut state = "there".to_owned();
            if kind == "secret" {
                state = string(&row, "updated_at");
            } else if kind != "user" && !files.exists() {
                state = "listed without its files".into();
            } else if let Some(all) = keys.get(&name).filter(|_| kind == "user") {
                let mut accepted = Vec::new();
                for key in all {
                    if daemon.call_as(key, &["list"])?.is_ok() {
                        accepted.push(key.as_str());
                    }
                }
                state = accepted.join(" ");
            }
            seen.states.insert(format!("{kind}:{name}"), state);
        }
    }
    Ok(())
}

/// Starts a sandbox, with its memory if possible. Returns the outcome and the content of its file:
/// one value if page cache and disk agree.
fn start_and_read(daemon: &Daemon, name: &str) -> Result<(String, String)> {
    let warm = daemon.call(&["start", name], "")?;
    let mut outcome = "ok".to_owned();
    if !warm.is_ok() {
        let cold = daemon.call(&["start", name, "--cold-boot"], "")?;
        if !cold.is_ok() {
            return Ok((format!("no: {}", cold.error), String::new()));
        }
        outcome = format!("cold only: {}", warm.error);
    }
    let read = daemon.call(&["exec", name, "--", "sh", "-c", READ_BOTH], "")?;
    let printed = read.json.as_ref().and_then(|it| it["stdout"].as_str()).unwrap_or_default();
    let data = match printed.split_whitespace().collect::<Vec<_>>()[..] {
        [memory, disk] if memory == disk => memory.to_owned(),
        [] => String::new(),
        [memory, disk] => format!("{memory} in memory, {disk} on the disk"),
        _ => format!("`{printed}` in memory and on the disk"),
    };
    Ok((outcome, data))
}

/// Lists the entries of the directories of [`KINDS`], as `KIND/NAME`.
fn entries(data: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for kind in KINDS {
        for entry in list_directory(&data.join(kind))? {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push(format!("{kind}/{name}"));
        }
    }
    found.sort();
    Ok(found)
}

/// Returns the id in an entry's name, which may have a prefix (`.save-ID`) or an extension.
fn id_in(entry: &str) -> &str {
    let name = entry.rsplit('/').next().unwrap_or(entry);
    let name = name.rsplit('-').next().unwrap_or(name);
    name.split('.').find(|part| !part.is_empty()).unwrap_or(name)
}

fn is_of(entry: &str, id: &str) -> bool {
    entry.contains(id)
}

/// Hashes the JSON and qcow2 files of each sandbox and snapshot, by the name of its directory. The
/// hash excludes images and the memory of base snapshots, which are never written again.
fn fingerprints(data: &Path) -> Result<BTreeMap<String, String>> {
    let mut prints = BTreeMap::new();
    for directory in KINDS[..2]
        .iter()
        .map(|kind| list_directory(&data.join(kind)))
        .collect::<Result<Vec<_>>>()?
        .concat()
    {
        let mut files = Vec::new();
        files_below(&directory, &mut files)?;
        files.sort();
        let mut hash = blake3::Hasher::new();
        for file in
            files.iter().filter(|it| it.extension().is_some_and(|it| it == "json" || it == "qcow2"))
        {
            hash.update(file.as_os_str().as_encoded_bytes());
            hash.update(&fs::read(file)?);
        }
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        prints.insert(name, hash.finalize().to_hex().to_string());
    }
    Ok(prints)
}

fn files_below(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !directory.is_dir() {
        return Ok(());
    }
    for entry in list_directory(directory)? {
        if entry.is_symlink() {
            continue;
        }
        if entry.is_dir() {
            files_below(&entry, files)?;
        } else {
            files.push(entry);
        }
    }
    Ok(())
}

/// Lists the layers that a VM's record names as the top of its disk and that are not qcow2 files.
fn unreadable_layers(data: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for directory in list_directory(&data.join("sandboxes"))? {
        let Ok(record) = fs::read_to_string(directory.join("vm.json")) else { continue };
        for file in list_directory(&directory)?
            .iter()
            .filter(|it| it.extension().is_some_and(|it| it == "qcow2"))
        {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let content = fs::read(file)?;
            if record.contains(&name) && !content.starts_with(b"QFI\xfb") {
                found.push(file.strip_prefix(data)?.display().to_string());
            }
        }
    }
    Ok(found)
}

fn list_directory(directory: &Path) -> Result<Vec<PathBuf>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}

fn string(row: &Value, field: &str) -> String {
    row[field].as_str().unwrap_or_default().to_owned()
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&fs::read(path)?).with_context(|| path.display().to_string())
}
