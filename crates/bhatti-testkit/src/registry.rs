//! Debian's registry on loopback, and images to push to it.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Child;

use crate::wait_for;

/// The password `secret` of `tester`, as bcrypt hashes it.
const PASSWORDS: &str = "tester:$2b$04$nMS7Bxf.11XHEctG6xTfZOR2IsPHODt.JYUX19bkBW7b0NSuTNUCe\n";

/// A running `docker-registry`. It ends when it is dropped.
pub struct RealRegistry {
    /// Its address and port.
    pub server: String,
    /// The authority of its certificate, as DER.
    pub authority: Vec<u8>,
    is_private: bool,
    _process: Child,
    directory: TempDir,
}

/// A layer of an image.
#[derive(Clone, Debug)]
pub struct Layer {
    media_type: &'static str,
    content: Vec<u8>,
    /// SHA-256 of the uncompressed content, in hexadecimal.
    diff_id: String,
}

impl Layer {
    /// A tar archive as it is.
    #[must_use]
    pub fn plain(tar: Vec<u8>) -> Self {
        let diff_id = sha256(&tar);
        Self { media_type: "layer.v1.tar", content: tar, diff_id }
    }

    /// A tar archive, compressed with gzip.
    ///
    /// # Panics
    ///
    /// Panics if memory runs out.
    #[must_use]
    pub fn gzip(tar: &[u8]) -> Self {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(tar).expect("memory takes all bytes");
        let content = encoder.finish().expect("memory takes all bytes");
        Self { media_type: "layer.v1.tar+gzip", content, diff_id: sha256(tar) }
    }

    /// The archive, compressed if the layer is.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// Another digest of the uncompressed content than the true one.
    #[must_use]
    pub fn with_diff_id(self, diff_id: &str) -> Self {
        Self { diff_id: diff_id.to_owned(), ..self }
    }
}

/// A layer with busybox, links to some of its commands, and further files: name, mode and content.
///
/// # Panics
///
/// Panics if busybox is not installed.
#[must_use]
pub fn busybox(files: &[(&str, u32, &[u8])]) -> Layer {
    let program = fs::read("/bin/busybox")
        .expect("busybox is installed: run scripts/install-packages.sh test");
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, mode: u32, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        builder.append_data(&mut header, name, content).expect("memory takes all bytes");
    };
    add("bin/busybox", 0o755, &program);
    for (name, mode, content) in files {
        add(name, *mode, content);
    }
    for name in ["sh", "cat", "id", "ls", "pwd", "env", "echo", "sleep"] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder
            .append_link(&mut header, format!("bin/{name}"), "busybox")
            .expect("memory takes all bytes");
    }
    Layer::gzip(&builder.into_inner().expect("memory takes all bytes"))
}

fn sha256(content: &[u8]) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, content))
}

/// Returns an address where nothing listens.
///
/// # Panics
///
/// Panics if this machine has no free port.
#[must_use]
pub fn unused_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("a listener has an address").to_string()
}

impl RealRegistry {
    /// Starts a registry without TLS and passwords.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    pub async fn start() -> Self {
        Self::start_with(false).await
    }

    /// Starts a registry with TLS, for `tester` with the password `secret`.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    pub async fn start_private() -> Self {
        Self::start_with(true).await
    }

    async fn start_with(is_private: bool) -> Self {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let path = directory.path();
        let server = unused_server();
        let certified = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()])
            .expect("a certificate can be made");
        let write = |name: &str, text: &str| {
            fs::write(path.join(name), text).expect("a file can be written");
            path.join(name)
        };
        let certificate = write("certificate", &certified.cert.pem());
        let key = write("key", &certified.signing_key.serialize_pem());
        let passwords = write("passwords", PASSWORDS);
        let mut config = json!({
            "version": "0.1",
            "log": { "level": "error" },
            "storage": { "filesystem": { "rootdirectory": path.join("data") } },
            "http": { "addr": server },
        });
        if is_private {
            config["http"]["tls"] = json!({ "certificate": certificate, "key": key });
            config["auth"] = json!({ "htpasswd": { "realm": "r", "path": passwords } });
        }
        // JSON is YAML, too.
        write("config.yml", &config.to_string());
        let process = serve(path, &server).await;
        let authority = certified.cert.der().to_vec();
        Self { server, authority, is_private, _process: process, directory }
    }

    /// Serves the same images at the same address once more, in the network namespace that this
    /// thread has now. That ends when the process is dropped.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    pub async fn serve_here(&self) -> Child {
        serve(self.directory.path(), &self.server).await
    }

    /// Returns the authority of its certificate, as PEM.
    ///
    /// # Panics
    ///
    /// Panics if the registry's files are gone.
    #[must_use]
    pub fn authority_pem(&self) -> String {
        fs::read_to_string(self.directory.path().join("certificate")).expect("the file was written")
    }

    /// Pushes an image of these layers as `name`, such as `team/app:1`. `config` has the settings
    /// of its processes.
    ///
    /// # Panics
    ///
    /// Panics if skopeo cannot push it.
    pub async fn push(&self, name: &str, layers: &[Layer], config: &Value) {
        let layout = tempfile::tempdir_in(self.directory.path()).expect("a directory can be made");
        make_layout(layout.path(), layers, config);
        let mut skopeo = bhatti_host::process::command("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]);
        skopeo.arg("--preserve-digests");
        skopeo.env("HOME", self.directory.path()).env("TMPDIR", self.directory.path());
        if self.is_private {
            skopeo.args(["--dest-creds", "tester:secret"]);
        }
        skopeo.arg(format!("oci:{}:1", layout.path().display()));
        skopeo.arg(format!("docker://{}/{name}", self.server));
        let pushed = skopeo.output().await.expect("skopeo is installed");
        assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
    }
}

impl RealRegistry {
    /// Removes the largest blob from the registry's disk, and what it remembers of it.
    ///
    /// # Panics
    ///
    /// Panics if there is no blob.
    pub fn remove_largest_blob(&self) {
        let blobs = self.directory.path().join("data/docker/registry/v2/blobs/sha256");
        let entries = |path: &Path| fs::read_dir(path).expect("the registry has blobs").flatten();
        let all = entries(&blobs).flat_map(|group| entries(&group.path()));
        let bytes = |blob: &std::path::PathBuf| {
            fs::metadata(blob.join("data")).map_or(0, |file| file.len())
        };
        let largest = all.map(|blob| blob.path()).max_by_key(bytes);
        fs::remove_dir_all(largest.expect("the registry has a blob")).expect("it can be removed");
    }
}

/// Starts a registry with the configuration in `directory`, and waits until it listens.
async fn serve(directory: &Path, server: &str) -> Child {
    let log = fs::File::options().create(true).append(true).open(directory.join("log"));
    let process = bhatti_host::process::command("docker-registry")
        .arg("serve")
        .arg(directory.join("config.yml"))
        .stdout(Stdio::null())
        .stderr(log.expect("a file can be made"))
        .spawn()
        .expect("docker-registry is installed: run scripts/install-packages.sh test");
    wait_for("the registry to listen", || std::net::TcpStream::connect(server).is_ok()).await;
    process
}

/// Makes an OCI layout with one image, whose tag is `1`.
///
/// # Panics
///
/// Panics if a file cannot be written.
pub fn make_layout(layout: &Path, layers: &[Layer], config: &Value) {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory can be made");
    let add = |kind: &str, content: &[u8]| {
        let hex = sha256(content);
        fs::write(blobs.join(&hex), content).expect("a file can be written");
        let media_type = format!("application/vnd.oci.image.{kind}");
        json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": content.len() })
    };
    let diff_ids: Vec<String> =
        layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect();
    let layers: Vec<Value> =
        layers.iter().map(|layer| add(layer.media_type, &layer.content)).collect();
    let created = "2026-01-01T00:00:00Z";
    let history = vec![json!({ "created": created, "created_by": "test" }); layers.len()];
    let config = json!({
        "created": created,
        "history": history,
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = add("config.v1+json", config.to_string().as_bytes());
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
    let mut manifest = add("manifest.v1+json", manifest.to_string().as_bytes());
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "1" });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    let write = |name: &str, text: &str| {
        fs::write(layout.join(name), text).expect("a file can be written");
    };
    write("index.json", &index.to_string());
    write("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
}
