//! The requirements on every engine, as tests on real VMs: an engine is done when it passes all
//! of them.
//!
//! Each part takes a [`Bench`] with a fresh directory, creates its own VMs there and removes
//! them. A part that finds a fault panics.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "tests panic")]

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bhatti_types::{DiskMib, SandboxId};

use crate::{
    AdoptError, Disks, Engine, MemoryKind, NewRoot, RestoreError, RestoreSpec, SnapshotError,
    SnapshotInfo, SnapshotRequest, Vm, VmSpec, VolumeFile,
};

/// Time limit of each step.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs scripts in a guest through its agent.
#[async_trait]
pub trait Shell: Send + Sync {
    /// Runs a script as root and returns its output, without the last newline. Panics if the
    /// script fails.
    async fn run(&self, vm: &dyn Vm, script: &str) -> String;

    /// Suspends the guest's processes, as before every snapshot.
    async fn suspend(&self, vm: &dyn Vm);

    /// Resumes the processes of a suspended guest, which keeps its identity.
    async fn wake(&self, vm: &dyn Vm);

    /// Configures a newly booted guest, with these volumes (mount point, and whether read-only)
    /// in its volume slots.
    async fn configure(&self, vm: &dyn Vm, volumes: &[(&str, bool)]);

    /// Gives a restored guest a new identity with this name, random bytes, and this host's wall
    /// clock.
    async fn become_another(&self, vm: &dyn Vm, name: &str);
}

/// An engine under test.
pub struct Bench<'a> {
    /// The engine.
    pub engine: &'a dyn Engine,
    /// Access to its guests.
    pub shell: &'a dyn Shell,
    /// A VM to boot; its directory does not exist yet.
    pub spec: VmSpec,
}

/// Boots a VM, drops it, adopts it, kills it and removes it.
pub async fn lifecycle(bench: &Bench<'_>) {
    let (engine, spec) = (bench.engine, &bench.spec);
    assert!(matches!(engine.adopt(spec.id, &spec.directory).await, Err(AdoptError::Gone)));
    engine.remove(spec.id, &spec.directory).await.unwrap();

    let vm = engine.boot(spec).await.unwrap();
    bench.run(&vm, "echo marker >/dev/shm/marker").await;
    drop(vm);
    let vm = engine.adopt(spec.id, &spec.directory).await.unwrap();
    assert_eq!(bench.run(&vm, "cat /dev/shm/marker").await, "marker");
    vm.pause().await.unwrap();
    drop(vm);
    let vm = engine.adopt(spec.id, &spec.directory).await.unwrap();
    assert!(!vm.is_running().await.unwrap(), "an adopted VM stays paused");

    engine.kill(spec.id, &spec.directory).await.unwrap();
    tokio::time::timeout(LIMIT, vm.ended()).await.expect("`ended` returns after the VM was killed");
    engine.kill(spec.id, &spec.directory).await.unwrap();
    assert!(matches!(engine.adopt(spec.id, &spec.directory).await, Err(AdoptError::Gone)));
    assert!(spec.directory.exists(), "`kill` keeps the files");
    bench.remove(&[spec.id], &[&spec.directory]).await;
}

/// Pauses and resumes a VM, each of them twice.
pub async fn thermal(bench: &Bench<'_>) {
    let vm = bench.engine.boot(&bench.spec).await.unwrap();
    bench
        .run(&vm, "(while :; do echo x >>/dev/shm/ticks; sleep 0.01; done) >/dev/null 2>&1 &")
        .await;
    for _ in 0..3 {
        vm.pause().await.unwrap();
        vm.pause().await.unwrap();
        assert!(!vm.is_running().await.unwrap());

        vm.resume().await.unwrap();
        vm.resume().await.unwrap();
        assert!(vm.is_running().await.unwrap());
        let more = "a=$(wc -l </dev/shm/ticks); until [ $(wc -l </dev/shm/ticks) -gt $a ]; do sleep 0.01; done; echo ticks";
        assert_eq!(bench.run(&vm, more).await, "ticks", "the process runs again");
    }
    bench.remove(&[bench.spec.id], &[&bench.spec.directory]).await;
}

/// Kills a VM and boots it again from its disk.
pub async fn keep_disk(bench: &Bench<'_>) {
    let (engine, spec) = (bench.engine, &bench.spec);
    let vm = engine.boot(spec).await.unwrap();
    bench.run(&vm, "echo kept >/root/kept; echo lost >/dev/shm/lost; sync").await;
    engine.kill(spec.id, &spec.directory).await.unwrap();

    let again = VmSpec { root_base: None, ..spec.clone() };
    let vm = engine.boot(&again).await.unwrap();

    let script = "cat /root/kept; test -e /dev/shm/lost || echo forgotten";
    assert_eq!(bench.run(&vm, script).await, "kept\nforgotten");
    bench.remove(&[spec.id], &[&spec.directory]).await;
}

/// Writes a volume in one VM and reads it in two others, which cannot write it.
pub async fn volumes(bench: &Bench<'_>) {
    let spec = &bench.spec;
    let file = spec.directory.with_extension("volume");
    make_volume(&file);
    let with = |spec: &VmSpec, read_only| {
        let mount = "/data/volume".to_owned();
        let volume = VolumeFile { path: file.clone(), read_only, mount };
        VmSpec { volumes: vec![Some(volume)], ..spec.clone() }
    };
    let writer = bench.engine.boot(&with(spec, false)).await.unwrap();
    bench.shell.configure(&*writer, &[("/data/volume", false)]).await;
    // The VM is killed: only synced data is on the disk.
    let script = "echo written >/data/volume/file; sync; stat -f -c %T /data/volume";
    assert_eq!(bench.run(&writer, script).await, "ext2/ext3");
    bench.remove(&[spec.id], &[&spec.directory]).await;
    assert!(file.exists(), "a volume outlives its VM");
    check_volume(&file);

    let before = content_of(&file);
    let (ids, places): (Vec<_>, Vec<_>) = (1..=2).map(|_| bench.another()).unzip();
    for (id, directory) in ids.iter().zip(&places) {
        let reader = VmSpec { id: *id, directory: directory.clone(), ..spec.clone() };
        let reader = bench.engine.boot(&with(&reader, true)).await.unwrap();
        bench.shell.configure(&*reader, &[("/data/volume", true)]).await;
        let script = "cat /data/volume/file; touch /data/volume/no 2>/dev/null || echo refused";
        assert_eq!(bench.run(&reader, script).await, "written\nrefused");
        // Root cannot write either, by remounting it or by writing to the block device.
        let script = "mount -o remount,rw /data/volume && touch /data/volume/no && echo mounted
            device=$(awk '$2 == \"/data/volume\" { print $1 }' /proc/mounts)
            test -b $device && dd if=/dev/urandom of=$device bs=4096 count=64 seek=100 conv=notrunc,fsync && echo overwritten
            umount /data/volume; true";
        assert_eq!(bench.run(&reader, &format!("{{ {script}; }} 2>/dev/null")).await, "");
    }
    bench.remove(&ids, &[&places[0], &places[1]]).await;
    assert!(content_of(&file) == before, "a read-only VM has written to the volume");
    check_volume(&file);
    fs::remove_file(file).unwrap();
}

fn content_of(file: &Path) -> Vec<u8> {
    fs::read(file).unwrap()
}

fn make_volume(file: &Path) {
    fs::File::create_new(file).unwrap().set_len(64 << 20).unwrap();
    e2fs("mke2fs", &["-q", "-t", "ext4"], file);
}

/// Checks the volume's file system. First replays its journal, as is done before a volume is
/// attached.
fn check_volume(file: &Path) {
    e2fs("e2fsck", &["-p"], file);
    e2fs("e2fsck", &["-f", "-n"], file);
}

#[expect(clippy::disallowed_methods, reason = "a tool that only tests run, with trusted input")]
fn e2fs(tool: &str, options: &[&str], file: &Path) {
    let path = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";
    let mut command = std::process::Command::new(tool);
    let output = command.args(options).arg(file).env("PATH", path).output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    // e2fsck exits with 1 if it corrected errors.
    assert!(output.status.code().unwrap() <= 1, "{tool}: {report}");
}

/// Checks that an engine that cannot save memory reports so, and that its VM continues.
pub async fn no_snapshots(bench: &Bench<'_>) {
    let (engine, spec) = (bench.engine, &bench.spec);
    assert!(!engine.capabilities().saves_memory);
    let vm = engine.boot(spec).await.unwrap();
    vm.pause().await.unwrap();
    let place = spec.directory.join("snapshot");
    let request = in_place(&place);
    let refused = vm.capture(&request).await.err().unwrap();
    assert!(matches!(refused, SnapshotError::Unsupported(_)), "{refused}");
    assert!(!place.exists());
    vm.resume().await.unwrap();
    assert_eq!(bench.run(&vm, "echo still runs").await, "still runs");
    let (id, directory) = bench.another();
    let refused = bench.wake(id, &directory, &place, Disks::Frozen).await.err().unwrap();
    assert!(matches!(refused, RestoreError::Unsupported(_)), "{refused}");
    assert!(!directory.exists());
    bench.remove(&[spec.id], &[&spec.directory]).await;
}

/// Takes one VM through a full snapshot and three diffs, with data of every phase in memory and
/// on the disk.
pub async fn snapshot_cycles(bench: &Bench<'_>) {
    let spec = &bench.spec;
    let mut vm = bench.engine.boot(spec).await.unwrap();
    bench.run(&vm, "sleep 100000 >/dev/null 2>&1 & echo $! >/dev/shm/sleeper").await;
    let kinds = [MemoryKind::Full, MemoryKind::Diff, MemoryKind::Diff, MemoryKind::Diff];
    for (phase, kind) in kinds.into_iter().enumerate() {
        let script = format!(
            "head -c 3000000 /dev/urandom >/dev/shm/p{phase}; cp /dev/shm/p{phase} /root/p{phase}; cd /; sha256sum dev/shm/p* root/p*"
        );
        let sums = bench.run(&vm, &script).await;

        vm = bench.sleep_and_wake(vm, Some(kind)).await;

        assert_eq!(bench.run(&vm, "cd /; sha256sum dev/shm/p* root/p*").await, sums, "{phase}");
        assert_eq!(bench.run(&vm, "kill -0 $(cat /dev/shm/sleeper) && echo alive").await, "alive");
    }
    // Reads from the disk, past the page cache: data written before the snapshots is there.
    let check = "sync; echo 3 >/proc/sys/vm/drop_caches; cat /root/p* | sha256sum; cat /dev/shm/p* | sha256sum";
    let sums = bench.run(&vm, check).await;
    let (on_disk, in_memory) = sums.split_once('\n').unwrap();
    assert_eq!(on_disk, in_memory);
    bench.remove(&[spec.id], &[&spec.directory]).await;
}

/// Saves a guest that waits for its root disk, and restores it with disks of two sizes. Each VM
/// uses its own disk.
pub async fn root_replacement(bench: &Bench<'_>) {
    let (engine, spec) = (bench.engine, &bench.spec);
    assert!(engine.capabilities().replaces_root);
    let none = spec.directory.with_extension("no-root");
    fs::File::create_new(&none).unwrap().set_len(1 << 20).unwrap();
    let waiting = VmSpec { root_base: Some(none.clone()), awaits_root: true, ..spec.clone() };
    let vm = engine.boot(&waiting).await.unwrap();
    let snapshot = spec.directory.with_extension("waiting");
    bench.snapshot(&vm, &snapshot, Some(MemoryKind::Full), Disks::Frozen).await;
    bench.remove(&[spec.id], &[&spec.directory]).await;

    let base = spec.root_base.clone().unwrap();
    for (disk, wanted) in
        [(None, fs::metadata(&base).unwrap().len()), (DiskMib::try_from(8192).ok(), 8 << 30)]
    {
        let (id, directory) = bench.another();
        let restored = RestoreSpec {
            id,
            directory: directory.clone(),
            snapshot: snapshot.clone(),
            disks: Disks::Frozen,
            tap: None,
            volumes: Vec::new(),
            root: Some(NewRoot { base: base.clone(), disk }),
            limit: LIMIT,
        };
        let vm = engine.stage(&restored).await.unwrap().load().await.unwrap();
        vm.resume().await.unwrap();
        let script = "cat /root/who 2>/dev/null; echo here >/root/who; sync
            cat /sys/class/block/$(awk '$2 == \"/\" { print $1 }' /proc/mounts | sed s,/dev/,,)/size";
        let sectors = bench.run(&vm, script).await;
        assert_eq!(sectors, (wanted / 512).to_string());
        let vm = bench.sleep_and_wake_at(vm, id, &directory, None).await;
        assert_eq!(bench.run(&vm, "cat /root/who").await, "here");
        bench.remove(&[id], &[&directory]).await;
    }
    fs::remove_dir_all(snapshot).unwrap();
    fs::remove_file(none).unwrap();
}

/// Forks a running VM twice, and one fork again: no VM sees another VM's writes, and their
/// snapshots do not change.
pub async fn fork(bench: &Bench<'_>) {
    let spec = &bench.spec;
    let parent = bench.engine.boot(spec).await.unwrap();
    bench.run(&parent, "echo parent | tee /dev/shm/who >/root/who; sync").await;
    let snapshot = spec.directory.with_extension("frozen");
    bench.snapshot(&parent, &snapshot, None, Disks::Frozen).await;
    parent.resume().await.unwrap();
    let before = content(&snapshot);

    let (ids, places): (Vec<_>, Vec<_>) = (1..=3).map(|_| bench.another()).unzip();
    let first = bench.wake(ids[0], &places[0], &snapshot, Disks::Frozen).await.unwrap();
    let second = bench.wake(ids[1], &places[1], &snapshot, Disks::Frozen).await.unwrap();
    let vms = [(&parent, "parent"), (&first, "first"), (&second, "second")];
    for (vm, name) in vms {
        assert_eq!(bench.run(vm, "cat /dev/shm/who /root/who").await, "parent\nparent", "{name}");
    }
    for (vm, name) in vms {
        bench.run(vm, &format!("echo {name} | tee /dev/shm/who >/root/who; head -c 9000000 /dev/urandom >/root/big; sync")).await;
    }
    let generation = spec.directory.with_extension("second");
    bench.snapshot(&second, &generation, Some(MemoryKind::Diff), Disks::Frozen).await;
    bench.remove(&[ids[1]], &[&places[1]]).await;
    let third = bench.wake(ids[2], &places[2], &generation, Disks::Frozen).await.unwrap();
    for (vm, name) in [(&parent, "parent"), (&first, "first"), (&third, "second")] {
        let script = "cat /dev/shm/who; echo 3 >/proc/sys/vm/drop_caches; cat /root/who";
        assert_eq!(bench.run(vm, script).await, format!("{name}\n{name}"));
    }
    assert!(content(&snapshot) == before, "a snapshot never changes");
    // A VM owns links to all files that it depends on: it can be saved and restored without the
    // snapshot that it was forked from.
    fs::remove_dir_all(&snapshot).unwrap();
    fs::remove_dir_all(&generation).unwrap();
    let first = bench.sleep_and_wake_at(first, ids[0], &places[0], None).await;
    assert_eq!(bench.run(&first, "cat /dev/shm/who /root/who").await, "first\nfirst");
    bench.remove(&[spec.id, ids[0], ids[2]], &[&spec.directory, &places[0], &places[2]]).await;
}

/// Checks that restored guests get a new identity before any of their processes resumes, and that
/// their parent keeps its own.
pub async fn identity(bench: &Bench<'_>) {
    let spec = &bench.spec;
    let parent = bench.engine.boot(spec).await.unwrap();
    let who = "hostname; echo id $(cat /etc/machine-id); head -c 16 /dev/urandom | od -An -tx1";
    let watch = "(while :; do hostname; sleep 0.01; done) >/dev/shm/seen 2>&1 &";
    bench.run(&parent, watch).await;
    let before = bench.run(&parent, who).await;
    bench.shell.suspend(&*parent).await;
    let snapshot = spec.directory.with_extension("frozen");
    bench.snapshot(&parent, &snapshot, None, Disks::Frozen).await;
    parent.resume().await.unwrap();
    bench.shell.wake(&*parent).await;

    let mut seen = vec![before.clone()];
    let (ids, places): (Vec<_>, Vec<_>) = (1..=2).map(|_| bench.another()).unzip();
    for (number, name) in [(0, "one"), (1, "two")] {
        let fork =
            bench.wake(ids[number], &places[number], &snapshot, Disks::Frozen).await.unwrap();
        bench.shell.become_another(&*fork, name).await;
        seen.push(bench.run(&fork, who).await);
        let host = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let earliest = host();
        let clock: u128 = bench.run(&fork, "date +%s%3N").await.parse().unwrap();
        let exact = earliest - 100..=host() + 100;
        assert!(exact.contains(&clock), "{name}: {clock} is not in {exact:?}");
        // Processes from before the snapshot resume with the new identity: they never see the
        // parent's name again.
        let names = "sed -n '/one\\|two/,$p' /dev/shm/seen | sort -u";
        let until = format!("until grep -q {name} /dev/shm/seen; do sleep 0.01; done; {names}");
        assert_eq!(bench.run(&fork, &until).await, name);
    }
    let parts: Vec<Vec<&str>> = seen.iter().map(|who| who.lines().collect()).collect();
    for part in 0..3 {
        let distinct: std::collections::BTreeSet<&str> =
            parts.iter().map(|who| who[part]).collect();
        assert_eq!(distinct.len(), 3, "{seen:?}");
    }
    let after = bench.run(&parent, who).await;
    assert_eq!(
        before.lines().take(2).collect::<Vec<_>>(),
        after.lines().take(2).collect::<Vec<_>>()
    );
    bench.remove(&[spec.id, ids[0], ids[1]], &[&spec.directory, &places[0], &places[1]]).await;
}

/// Checks that snapshots that cannot be saved or restored are refused, and that the refusal
/// changes nothing.
pub async fn failure(bench: &Bench<'_>) {
    let (engine, spec) = (bench.engine, &bench.spec);
    let vm = engine.boot(spec).await.unwrap();
    bench.run(&vm, "echo marker >/dev/shm/marker").await;
    let place = spec.directory.join("snapshot");
    let request = in_place(&place);
    let refused = vm.capture(&request).await.err().unwrap();
    assert!(matches!(refused, SnapshotError::NotPaused), "{refused}");
    vm.pause().await.unwrap();
    fs::write(&place, "another file").unwrap();
    vm.capture(&request).await.err().expect("a snapshot over an existing file is refused");
    assert_eq!(fs::read(&place).unwrap(), b"another file");
    fs::remove_file(&place).unwrap();
    // Discard a snapshot after `capture`, and one that is complete except for its name.
    drop(vm.capture(&request).await.unwrap());
    let captured = vm.capture(&request).await.unwrap();
    fs::write(&place, "in the way").unwrap();
    captured.finish().await.expect_err("a snapshot over a file created meanwhile is refused");
    fs::remove_file(&place).unwrap();
    let mut left = names(&spec.directory);
    left.retain(|name| name.starts_with("snapshot"));
    assert_eq!(left, Vec::<String>::new());
    vm.resume().await.unwrap();
    assert_eq!(bench.run(&vm, "cat /dev/shm/marker").await, "marker", "the VM continues");

    bench.snapshot(&vm, &place, Some(MemoryKind::Diff), Disks::InPlace).await;
    engine.kill(spec.id, &spec.directory).await.unwrap();
    let asleep = names(&spec.directory);
    for name in names(&place) {
        let path = place.join(&name);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 0x10;
        for damaged in [&whole[..middle], &[][..], &flipped] {
            // The file may be read-only.
            fs::remove_file(&path).unwrap();
            fs::write(&path, damaged).unwrap();
            let refused = bench.wake(spec.id, &spec.directory, &place, Disks::InPlace).await;
            let error = refused.err().unwrap_or_else(|| panic!("damaged {name} was restored"));
            let is_refused = matches!(
                error,
                RestoreError::Damaged { .. } | RestoreError::Mismatch { .. } | RestoreError::Stale
            );
            assert!(is_refused, "{name}: {error:?}");
            assert!(matches!(engine.adopt(spec.id, &spec.directory).await, Err(AdoptError::Gone)));
            assert_eq!(names(&spec.directory), asleep, "{name}");
        }
        fs::write(&path, whole).unwrap();
    }
    let none = spec.directory.join("none");
    let missing = bench.wake(spec.id, &spec.directory, &none, Disks::InPlace).await;
    assert!(matches!(missing, Err(RestoreError::Damaged { .. })));
    // After all that, the snapshot is still usable.
    let vm = bench.wake(spec.id, &spec.directory, &place, Disks::InPlace).await.unwrap();
    assert_eq!(bench.run(&vm, "cat /dev/shm/marker").await, "marker");
    // The disk is written: that memory must never be restored over it.
    bench.run(&vm, "echo newer >/root/newer; sync").await;
    engine.kill(spec.id, &spec.directory).await.unwrap();
    let stale = bench.wake(spec.id, &spec.directory, &place, Disks::InPlace).await;
    assert!(matches!(stale, Err(RestoreError::Stale)));
    bench.remove(&[spec.id], &[&spec.directory]).await;
}

impl Bench<'_> {
    async fn run(&self, vm: &Arc<dyn Vm>, script: &str) -> String {
        self.shell.run(vm.as_ref(), script).await
    }

    /// Pauses a VM and saves it.
    async fn snapshot(
        &self,
        vm: &Arc<dyn Vm>,
        directory: &Path,
        memory: Option<MemoryKind>,
        disks: Disks,
    ) -> SnapshotInfo {
        vm.pause().await.unwrap();
        let request =
            SnapshotRequest { directory: directory.to_owned(), memory, disks, copies: Vec::new() };
        let info = vm.capture(&request).await.unwrap().finish().await.unwrap();
        assert!(memory.is_none_or(|memory| memory == info.memory));
        assert!(!vm.is_running().await.unwrap(), "the VM stays paused until the caller resumes it");
        info
    }

    async fn wake(
        &self,
        id: SandboxId,
        directory: &Path,
        snapshot: &Path,
        disks: Disks,
    ) -> Result<Arc<dyn Vm>, RestoreError> {
        let spec = RestoreSpec {
            id,
            directory: directory.to_owned(),
            snapshot: snapshot.to_owned(),
            disks,
            tap: None,
            volumes: Vec::new(),
            root: None,
            limit: LIMIT,
        };
        let vm = self.engine.stage(&spec).await?.load().await?;
        assert!(!vm.is_running().await.unwrap(), "the VM stays paused until the caller resumes it");
        vm.resume().await.unwrap();
        Ok(vm)
    }

    async fn sleep_and_wake(&self, vm: Arc<dyn Vm>, memory: Option<MemoryKind>) -> Arc<dyn Vm> {
        self.sleep_and_wake_at(vm, self.spec.id, &self.spec.directory, memory).await
    }

    async fn sleep_and_wake_at(
        &self,
        vm: Arc<dyn Vm>,
        id: SandboxId,
        directory: &Path,
        memory: Option<MemoryKind>,
    ) -> Arc<dyn Vm> {
        let snapshot = directory.join("snapshot");
        self.snapshot(&vm, &snapshot, memory, Disks::InPlace).await;
        self.engine.kill(id, directory).await.unwrap();
        let vm = self.wake(id, directory, &snapshot, Disks::InPlace).await.unwrap();
        fs::remove_dir_all(snapshot).unwrap();
        vm
    }

    /// Returns an id and a directory beside the first VM's.
    fn another(&self) -> (SandboxId, PathBuf) {
        let id = random_id();
        (id, self.spec.directory.with_file_name(id.to_string()))
    }

    async fn remove(&self, ids: &[SandboxId], directories: &[&Path]) {
        for (id, directory) in ids.iter().zip(directories) {
            self.engine.remove(*id, directory).await.unwrap();
            assert!(!directory.exists());
        }
    }
}

fn in_place(directory: &Path) -> SnapshotRequest {
    SnapshotRequest {
        directory: directory.to_owned(),
        memory: None,
        disks: Disks::InPlace,
        copies: Vec::new(),
    }
}

/// Returns an id that no other test uses: some engines find VMs on the whole host by their id.
#[must_use]
pub fn random_id() -> SandboxId {
    SandboxId::from_entropy(RandomState::new().build_hasher().finish().to_be_bytes())
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A longer file is a disk, and mostly empty.
const READ_BYTES_MAX: u64 = 1 << 30;

/// Returns all files of a snapshot: of a disk, its modification time; of the others, their bytes.
fn content(directory: &Path) -> Vec<(String, SystemTime, Vec<u8>)> {
    let read = |name: String| {
        let path = directory.join(&name);
        let file = fs::metadata(&path).unwrap();
        let is_disk = file.len() > READ_BYTES_MAX;
        let bytes = if is_disk { Vec::new() } else { fs::read(path).unwrap() };
        (name, file.modified().unwrap(), bytes)
    };
    names(directory).into_iter().map(read).collect()
}
