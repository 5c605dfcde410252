//! Images of a registry: pulled, unpacked and started as sandboxes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::path::Path;
use std::process::Output;

use bhatti_testkit::registry::{Layer, RealRegistry};
use bhatti_testkit::{Feature, LIMIT, Serve, TestDaemon, needs, run};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;
use tokio::time::timeout;

/// A data directory with images of its own, whose daemon allows a registry on loopback.
struct Place {
    directory: TempDir,
    daemon: TestDaemon,
    registry: RealRegistry,
}

impl Place {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("images");
        let copied = bhatti_host::process::command("cp")
            .args(["-a", "--reflink=auto"])
            .arg(bhatti_testkit::images())
            .arg(&images)
            .status();
        assert!(copied.await.unwrap().success());
        let serve = Serve { images: Some(images), ..Serve::default() };
        // The registry and the command line share the daemon's network.
        let daemon = TestDaemon::start_with(serve).await;
        let registry = RealRegistry::start().await;
        let config =
            format!("registries:\n  '{}': {{plain_http: true, private: true}}\n", registry.server);
        fs::write(directory.path().join("config.yaml"), config).unwrap();
        Self { directory, daemon, registry }
    }

    /// Runs `bhatti image pull` for an image of the registry.
    async fn pull(&self, name: &str) -> Output {
        let mut command = bhatti_host::process::command(bhatti_testkit::dist("bhatti"));
        command.arg("--data-dir").arg(self.directory.path());
        command.args(["image", "pull"]).arg(format!("{}/{name}", self.registry.server));
        timeout(LIMIT, command.output()).await.unwrap().unwrap()
    }

    /// Names of the files beside the images, without those of the tests' own images.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path().join("images")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name.starts_with(".layers-")).collect();
        names.sort();
        names
    }
}

/// Makes a tar archive of files: name, mode and content.
fn tar(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, mode, content) in files {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

#[tokio::test]
async fn image_from_scratch_is_pulled_once_and_runs() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let place = Place::new().await;
    // The guest agent's program needs no library. Run by hand, it refuses to run.
    let program = fs::read(bhatti_testkit::dist("lohar")).unwrap();
    let lower = tar(&[("app", 0o755, &program), ("removed", 0o644, b"old"), ("kept", 0o600, b"1")]);
    let upper = tar(&[(".wh.removed", 0o644, b""), ("etc/new", 0o640, b"2")]);
    let layers = [Layer::gzip(&lower), Layer::plain(upper)];
    place.registry.push("team/app:1", &layers, &json!({})).await;
    let name = format!("{}/team/app:1", place.registry.server);

    let pulled = place.pull("team/app:1").await;

    assert!(pulled.status.success(), "{}", text(&pulled.stderr));
    assert!(text(&pulled.stdout).contains(&format!("pulled {name}")), "{pulled:?}");
    assert_eq!(place.left(), Vec::<String>::new());
    let client = &place.daemon.client;
    let request = bhatti_api::CreateSandbox {
        name: Some("one".to_owned()),
        image: Some(name.clone()),
        ..bhatti_api::CreateSandbox::default()
    };
    let created = client.create(&request).await.unwrap();
    assert_eq!(created.image, name);
    let ran = run(client, "one", &["/app"]).await.unwrap();
    assert!(text(&ran.stderr).contains("refusing to run"), "{ran:?}");

    // The second pull has nothing to download or to build.
    place.registry.push("team/app:2", &layers, &json!({})).await;
    let again = place.pull("team/app:2").await;
    assert!(again.status.success(), "{}", text(&again.stderr));
    let images = place.directory.path().join("images");
    assert_eq!(built(&images), 1);
    let listed = place.daemon.client.list_images().await.unwrap();
    assert_eq!(listed.iter().filter(|image| image.name.contains("/team/app:")).count(), 2);
    client.destroy("one").await.unwrap();
}

/// Number of file systems that were built from layers.
fn built(images: &Path) -> usize {
    let names = fs::read_dir(images).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with("rootfs-oci")).count()
}

#[tokio::test]
async fn hostile_and_false_images_are_refused_and_leave_nothing_behind() {
    let place = Place::new().await;
    let refused = async |layers: &[Layer], config: &Value, wanted: &str| {
        place.registry.push("bad/app:1", layers, config).await;
        let pulled = place.pull("bad/app:1").await;
        let said = text(&pulled.stderr);
        assert!(!pulled.status.success() && said.contains(wanted), "{said}");
        assert_eq!(place.left(), Vec::<String>::new(), "{said}");
        assert_eq!(built(&place.directory.path().join("images")), 0, "{said}");
    };
    let none = json!({});
    let mut outside = tar(&[("aa/x", 0o644, b"x")]);
    outside[..2].copy_from_slice(b"..");
    // The checksum of the changed header.
    let sum: u32 = outside[..512]
        .iter()
        .enumerate()
        .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) })
        .sum();
    outside[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    refused(&[Layer::gzip(&outside)], &none, "`../x`: the name leads out of the image").await;

    let mut bomb =
        Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best()));
    let mut header = Header::new_ustar();
    header.set_size(1 << 42);
    header.set_path("zeros").unwrap();
    header.set_cksum();
    bomb.append(&header, &[0; 1 << 20][..]).unwrap();
    let bomb = bomb.into_inner().unwrap().finish().unwrap();
    refused(&[Layer::plain(bomb)], &none, "bytes in its files").await;

    let good = tar(&[("app", 0o755, b"x")]);
    let other = Layer::gzip(&good).with_diff_id(&"0".repeat(64));
    refused(&[other], &none, "is not `0000").await;
    refused(&[Layer::plain(b"no archive".repeat(100))], &none, "this is no tar archive").await;
    let mut cut = tar(&[("app", 0o755, &[b'x'; 1000])]);
    cut.truncate(700);
    refused(&[Layer::plain(cut)], &none, "`app`").await;
}
