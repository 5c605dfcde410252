//! Compares a pull and the first command of an image, ours and Docker's: from one registry, in
//! turns.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bhatti_testkit::registry::{Layer, RealRegistry};
use bhatti_testkit::{
    Serve, TestDaemon, named, own_images, peak_resident_mib, reset_peak, wait_for,
};
use serde_json::json;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::{Docker, docker_cli};
use crate::bench::{VM_PRACTISES, median, show};

/// Measured rounds, after one that does not count. An odd number has one median.
const ROUNDS: usize = 11;

/// What the image leaves out of the tests' Debian, so that it is as large as one with Python
/// usually is.
const LEFT_OUT: [&str; 5] = [
    "./usr/share/locale",
    "./usr/share/doc",
    "./usr/lib/git-core",
    "./usr/share/perl",
    "./var/lib",
];

/// Lets the daemon use the registry.
const CONFIG: &str = "network: off\nregistries:\n  127.0.0.1: {plain_http: true, private: true}\n";

/// A registry with images, for a Docker daemon in this network namespace.
pub(super) struct Source {
    registry: RealRegistry,
    layer: Layer,
    size: String,
}

impl Source {
    /// Makes the layer of all images, and starts the registry.
    pub(super) async fn start() -> Result<Self> {
        let registry = RealRegistry::start().await;
        let archive = debian().await?;
        let layer = Layer::gzip(&archive);
        let size = format!("{} MB, {} MB as gzip", mb(archive.len()), mb(layer.content().len()));
        Ok(Self { registry, layer, size })
    }

    /// Pushes an image that nobody has seen: another one than those of other rounds. Returns its
    /// reference.
    async fn image(&self, round: usize) -> String {
        let variables = ["PATH=/usr/bin:/bin".to_owned(), format!("ROUND={round}")];
        let config = json!({ "Cmd": ["python3"], "Env": variables });
        let name = format!("debian:{round}");
        self.registry.push(&name, std::slice::from_ref(&self.layer), &config).await;
        format!("{}/{name}", self.registry.server)
    }
}

fn mb(bytes: usize) -> usize {
    bytes / 1_000_000
}

/// Returns an archive of the tests' Debian with Python.
async fn debian() -> Result<Vec<u8>> {
    let place = tempfile::tempdir()?;
    let images = bhatti_testkit::images();
    let mut files = fs::read_dir(&images)?.flatten().map(|entry| entry.path());
    let is_minimal = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("rootfs-minimal")
    };
    let image = files.find(|path| is_minimal(path)).context("the image `minimal` is missing")?;
    let mut dump = bhatti_host::process::command("debugfs");
    dump.arg("-R").arg(format!("rdump / {}", place.path().display())).arg(image);
    output(&mut dump).await?;
    let mut tar = bhatti_host::process::command("tar");
    tar.args(LEFT_OUT.map(|path| format!("--exclude={path}")));
    tar.arg("-C").arg(place.path()).args(["-c", "."]);
    output(&mut tar).await
}

async fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// A daemon that pulls from a registry with the same data in its own network namespace.
struct Place {
    daemon: TestDaemon,
    _images: TempDir,
    _registry: Child,
}

impl Place {
    async fn start(source: &Source) -> Result<Self> {
        let images = own_images().await;
        let directory = images.path().join("images");
        let serve =
            Serve { config: CONFIG.to_owned(), images: Some(directory), ..Serve::default() };
        let mut daemon = TestDaemon::start_with(serve).await;
        // Base snapshots of its own: those that all tests share may have some of an earlier run.
        daemon.terminate().await;
        let bases = daemon.data_dir().join("templates");
        fs::remove_file(&bases)?;
        fs::create_dir(&bases)?;
        daemon.serve().await;
        // The snapshot before the root disk is made once for all images.
        daemon.client.create(&named("first")).await?;
        daemon.client.destroy("first").await?;
        let registry = source.registry.serve_here().await;
        Ok(Self { daemon, _images: images, _registry: registry })
    }

    /// Returns the duration of `bhatti run`.
    async fn run(&self, reference: &str) -> Result<Duration> {
        let began = Instant::now();
        output(&mut self.daemon.cli(&["run", reference, "--", "true"])).await?;
        Ok(began.elapsed())
    }
}

/// Measures and prints.
pub(super) async fn measure(source: &Source, docker: Option<&Docker>) -> Result<()> {
    let place = Place::start(source).await?;
    let [mut first, mut again, mut docker_first, mut docker_again] = [const { Vec::new() }; 4];
    let pid = place.daemon.pid();
    let mut grown = 0;
    for round in 0..=ROUNDS {
        let reference = source.image(round).await;
        let run = ["run", "--rm", "--network", "none", &reference, "true"];
        reset_peak(pid);
        let before = peak_resident_mib(pid);
        let with_pull = place.run(&reference).await?;
        // As for the creations below: the second one finds a spare.
        wait_for("the spare VM", || place.daemon.all_vmm_pids().len() == 1).await;
        tokio::time::sleep(VM_PRACTISES).await;
        let ours = [with_pull, place.run(&reference).await?];
        grown = grown.max(peak_resident_mib(pid) - before);
        output(&mut place.daemon.cli(&["image", "delete", &reference])).await?;
        if round > 0 {
            first.push(ours[0]);
            again.push(ours[1]);
        }
        let Some(docker) = docker else { continue };
        let theirs = [docker.time(&run).await?, docker.time(&run).await?];
        docker_cli(&docker.socket, &["image", "rm", &reference]).await?;
        if round > 0 {
            docker_first.push(theirs[0]);
            docker_again.push(theirs[1]);
        }
    }
    println!("image of {}, from a registry on this machine:", source.size);
    beside("bhatti run, with the pull", first, "docker run, with the pull", docker_first);
    beside("bhatti run again", again, "docker run again", docker_again);
    println!("{:44} {grown:>26} MiB", "the daemon's memory grew meanwhile by");
    Ok(())
}

fn beside(what: &str, ours: Vec<Duration>, other: &str, theirs: Vec<Duration>) {
    show(what, ours.clone());
    if !theirs.is_empty() {
        show(other, theirs.clone());
        let [ours, theirs] = [ours, theirs].map(|mut times| median(&mut times).as_secs_f64());
        println!("{:44} {:>26.2} × {other}", "", ours / theirs);
    }
}
