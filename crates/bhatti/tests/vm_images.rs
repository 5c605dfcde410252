//! Images: pulled from a registry, unpacked, owned, shared, and started as sandboxes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "vm_images/limits.rs"]
mod limits;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::Output;

use bhatti_api::{
    CreateSandbox, CreateUser, ErrorCode, ExecRequest, ImageSettings, Operation, PullImage,
    SaveImage, SetRegistryLogin, StartSandbox,
};
use bhatti_client::{Client, ClientError};
use bhatti_testkit::registry::{Layer, RealRegistry, busybox};
use bhatti_testkit::{Feature, LIMIT, Serve, TestDaemon, needs, own_images, run, wait_for};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;
use tokio::time::timeout;

/// Lets the daemon use registries on loopback, and listen for users.
const CONFIG: &str =
    "listen: 127.0.0.1:0\nregistries:\n  127.0.0.1: {plain_http: true, private: true}\n";

/// A daemon with images of its own, and a registry in its network.
struct Place {
    images: TempDir,
    daemon: TestDaemon,
    registry: RealRegistry,
}

impl Place {
    async fn new() -> Self {
        let images = own_images().await;
        let directory = images.path().join("images");
        let serve =
            Serve { config: CONFIG.to_owned(), images: Some(directory), ..Serve::default() };
        let daemon = TestDaemon::start_with(serve).await;
        let registry = RealRegistry::start().await;
        Self { images, daemon, registry }
    }

    fn client(&self) -> &Client {
        &self.daemon.client
    }

    /// Returns the whole reference of an image of the registry.
    fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.server)
    }

    /// Runs `bhatti image pull` for an image of the registry.
    async fn pull(&self, name: &str) -> Output {
        let reference = self.reference(name);
        let mut command = self.daemon.cli(&["image", "pull", &reference]);
        timeout(LIMIT, command.output()).await.unwrap().unwrap()
    }

    /// Pulls an image as a user, and returns how that ended.
    async fn pull_as(&self, client: &Client, name: &str) -> Operation {
        let request = PullImage { image: self.reference(name), ..PullImage::default() };
        let begun = client.pull_image(&request).await.unwrap();
        let ended = async {
            loop {
                let operation = client.operation(&begun.id, 60).await.unwrap();
                if operation.status != "running" {
                    return operation;
                }
            }
        };
        timeout(LIMIT, ended).await.unwrap()
    }

    /// Makes a user with a quota of disk space, and returns a client of that user.
    async fn user(&self, name: &str, max_disk_mb: Option<u32>) -> Client {
        let name = name.to_owned();
        let request = CreateUser { name, max_disk_mb, ..CreateUser::default() };
        let made = self.client().create_user(&request).await.unwrap();
        let address = format!("http://{}", self.daemon.api_address());
        Client::http(&address, &made.api_key).unwrap()
    }

    fn directory(&self) -> PathBuf {
        self.images.path().join("images")
    }

    /// Names of the files of builds.
    fn builds(&self) -> Vec<String> {
        self.files(".layers-")
    }

    /// Names of the file systems that were built from layers.
    fn built(&self) -> Vec<String> {
        self.files("rootfs-oci")
    }

    fn files(&self, prefix: &str) -> Vec<String> {
        let entries = fs::read_dir(self.directory()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
        names.sort();
        names
    }

    /// Number of whole layers, as the registry has them.
    fn blobs(&self) -> usize {
        fs::read_dir(self.directory().join("blobs/sha256")).map_or(0, Iterator::count)
    }
}

fn image_of(image: &str) -> CreateSandbox {
    CreateSandbox { image: Some(image.to_owned()), ..CreateSandbox::default() }
}

fn cold_boot() -> StartSandbox {
    StartSandbox { cold_boot: true }
}

fn code(error: ClientError) -> ErrorCode {
    match error {
        ClientError::Refused(body) => body.code,
        error => panic!("{error}"),
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
    let name = place.reference("team/app:1");

    let pulled = place.pull("team/app:1").await;

    assert!(pulled.status.success(), "{}", text(&pulled.stderr));
    assert!(text(&pulled.stdout).contains(&format!("pulled {name}")), "{pulled:?}");
    assert_eq!(place.builds(), Vec::<String>::new());
    let client = place.client();
    let request = CreateSandbox { name: Some("one".to_owned()), ..image_of(&name) };
    let created = client.create(&request).await.unwrap();
    assert_eq!(created.image, name);
    let ran = run(client, "one", &["/app"]).await.unwrap();
    assert!(text(&ran.stderr).contains("refusing to run"), "{ran:?}");

    // The second pull has nothing to download or to build.
    place.registry.push("team/app:2", &layers, &json!({})).await;
    let again = place.pull("team/app:2").await;
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert_eq!(place.built().len(), 1);
    let listed = client.list_images().await.unwrap();
    assert_eq!(listed.iter().filter(|image| image.name.contains("/team/app:")).count(), 2);
    client.destroy("one").await.unwrap();
}

#[tokio::test]
async fn command_of_the_image_runs_as_a_job_and_ends_by_its_stop_signal() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let place = Place::new().await;
    let client = place.client();
    let script = "trap '' TERM; trap 'exit 42' INT; echo set up; while :; do /bin/sleep 0.1; done";
    let config = json!({ "Cmd": ["/bin/sh", "-c", script], "StopSignal": "INT" });
    place.registry.push("server:1", &[busybox(&[])], &config).await;
    let server = place.reference("server:1");
    let request = CreateSandbox { name: Some("web".to_owned()), start: true, ..image_of(&server) };
    client.create(&request).await.unwrap();
    client.stop("web").await.unwrap();
    client.start("web", &cold_boot()).await.unwrap();
    // It runs again after a boot from the disk.
    let jobs = client.list_sessions("web").await.unwrap();
    assert_eq!(jobs.iter().filter(|job| job.running && !job.tty).count(), 1, "{jobs:?}");
    // A stop of the job sends the image's signal.
    let job = &jobs[0].session_id;
    let mut output = client.job_output("web", job, Some(0), true).await.unwrap();
    timeout(LIMIT, output.next()).await.unwrap().unwrap().unwrap();
    drop(output);
    let stop = ["job", "stop", "web", job, "--time", "60"];
    let stopped = timeout(LIMIT, place.daemon.cli(&stop).output()).await.unwrap().unwrap();
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    let job = client.inspect_job("web", job).await.unwrap();
    assert_eq!((job.running, job.exit_code), (false, Some(42)));
    client.destroy("web").await.unwrap();
    // An image without a command, and one whose command does not exist, leave no sandbox.
    let gone = json!({ "Cmd": ["/no/such/program"] });
    place.registry.push("gone:1", &[busybox(&[])], &gone).await;
    for (image, wanted) in [
        ("minimal".to_owned(), ErrorCode::BadRequest),
        (place.reference("gone:1"), ErrorCode::CommandNotFound),
    ] {
        let request = CreateSandbox { start: true, ..image_of(&image) };
        assert_eq!(code(client.create(&request).await.unwrap_err()), wanted, "{image}");
    }
    assert_eq!(client.list().await.unwrap(), []);
}

#[tokio::test]
async fn processes_get_the_settings_of_the_image() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let place = Place::new().await;
    let passwd = b"root:x:0:0::/root:/bin/sh\napp:x:900:900::/home/app:/bin/sh\n";
    let files: [(&str, u32, &[u8]); 2] =
        [("etc/passwd", 0o644, passwd), ("etc/group", 0o644, b"app:x:900:\nextra:x:77:\n")];
    let config = json!({
        "Env": ["PATH=/bin", "GREETING=hello there"],
        "User": "app:extra", "WorkingDir": "/srv/made",
        "Entrypoint": ["/bin/echo", "from"], "Cmd": ["the image"],
        "ExposedPorts": { "8080/tcp": {} }, "Labels": { "team": "web" }, "StopSignal": "SIGINT",
    });
    place.registry.push("app:1", &[busybox(&files)], &config).await;
    let name = place.reference("app:1");
    let client = place.client();

    // The creation pulls the image.
    let request = CreateSandbox {
        name: Some("one".to_owned()),
        env: BTreeMap::from([("OWN".to_owned(), "1".to_owned())]),
        ..image_of(&name)
    };
    client.create(&request).await.unwrap();

    let script = "echo $(id -u):$(id -g) $(pwd) $HOME $GREETING $OWN";
    let said = run(client, "one", &["sh", "-c", script]).await.unwrap();
    assert_eq!(text(&said.stdout), "900:77 /srv/made /home/app hello there 1\n");
    let exec = ExecRequest {
        cmd: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        user: Some("root".to_owned()),
        cwd: Some("/etc".to_owned()),
        env: BTreeMap::from([("GREETING".to_owned(), "hi".to_owned())]),
        ..ExecRequest::default()
    };
    let said = client.exec("one", &exec).await.unwrap();
    assert_eq!(said.stdout, "0:0 /etc /root hi 1\n");

    // Without a command, `run` runs the entrypoint and its arguments; with one, other arguments.
    for (arguments, wanted) in [(&[][..], "from the image\n"), (&["--", "me"], "from me\n")] {
        let all = [&["run", name.as_str()][..], arguments].concat();
        let ran = timeout(LIMIT, place.daemon.cli(&all).output()).await.unwrap().unwrap();
        assert_eq!(text(&ran.stdout), wanted, "{}", text(&ran.stderr));
    }

    // A stop, a fork and a boot from the disk keep the settings.
    let forked = place.daemon.cli(&["fork", "one", "--name", "two"]).output().await.unwrap();
    assert!(forked.status.success(), "{}", text(&forked.stderr));
    client.stop("one").await.unwrap();
    client.start("one", &cold_boot()).await.unwrap();
    for sandbox in ["one", "two"] {
        let said = run(client, sandbox, &["sh", "-c", "id -u; pwd; echo $GREETING"]).await.unwrap();
        assert_eq!(text(&said.stdout), "900\n/srv/made\nhello there\n", "{sandbox}");
        client.destroy(sandbox).await.unwrap();
    }
    let shown = client.inspect_image(&name).await.unwrap();
    let settings = shown.config.unwrap();
    assert_eq!(shown.owner, "me");
    assert_eq!(
        (settings.exposed_ports, settings.stop_signal, settings.labels["team"].as_str()),
        (vec!["8080/tcp".to_owned()], "SIGINT".to_owned(), "web")
    );
    let host = client.inspect_image("minimal").await.unwrap();
    assert_eq!((host.owner.as_str(), host.config), ("host", None::<ImageSettings>));
}

#[tokio::test]
async fn policy_says_when_an_image_is_pulled() {
    let place = Place::new().await;
    let name = place.reference("policy:1");
    let (client, push) = (place.client(), |text: &'static [u8]| {
        let layer = busybox(&[("version", 0o644, text)]);
        async { place.registry.push("policy:1", &[layer], &json!({})).await }
    });
    let create = async |sandbox: &str, image: &str, pull: Option<&str>| {
        let request = CreateSandbox {
            name: Some(sandbox.to_owned()),
            pull: pull.map(str::to_owned),
            ..image_of(image)
        };
        client.create(&request).await.map_err(code)
    };
    assert_eq!(create("a", &name, None).await.unwrap_err(), ErrorCode::NotFound);
    assert_eq!(create("a", "Not/A reference", None).await.unwrap_err(), ErrorCode::BadRequest);
    assert_eq!(create("a", &name, Some("often")).await.unwrap_err(), ErrorCode::BadRequest);
    push(b"1").await;
    assert_eq!(create("a", &name, Some("never")).await.unwrap_err(), ErrorCode::NotFound);
    assert_eq!(place.built().len(), 0);

    if !needs(Feature::OwnKernel) {
        return;
    }
    // Two that ask at once wait for one pull.
    let (a, b) = tokio::join!(create("a", &name, None), create("b", &name, None));
    a.unwrap();
    b.unwrap();
    assert_eq!(
        client.list_operations().await.unwrap().iter().filter(|it| it.status == "done").count(),
        1
    );
    push(b"2").await;
    create("c", &name, Some("missing")).await.unwrap();
    create("d", &name, Some("always")).await.unwrap();

    for (sandbox, version) in [("a", "1"), ("b", "1"), ("c", "1"), ("d", "2")] {
        let said = run(client, sandbox, &["cat", "/version"]).await.unwrap();
        assert_eq!(text(&said.stdout), version, "{sandbox}");
    }
    // The sandboxes have links to the first version, which no image has.
    wait_for("the first version to go", || place.built().len() == 1).await;
    client.stop("a").await.unwrap();
    client.start("a", &cold_boot()).await.unwrap();
    let said = run(client, "a", &["cat", "/version"]).await.unwrap();
    assert_eq!(text(&said.stdout), "1");
    for sandbox in ["a", "b", "c", "d"] {
        client.destroy(sandbox).await.unwrap();
    }
}

#[tokio::test]
async fn images_belong_to_users_who_can_share_them() {
    let place = Place::new().await;
    place.registry.push("own:1", &[busybox(&[])], &json!({})).await;
    let (alice, bob) = (place.user("alice", None).await, place.user("bob", Some(20)).await);
    let name = place.reference("own:1");

    assert_eq!(place.pull_as(&alice, "own:1").await.status, "done");
    assert_eq!(alice.inspect_image(&name).await.unwrap().owner, "me");
    let of_bob = async |name: &str| bob.inspect_image(name).await.map(|image| image.owner);
    assert_eq!(of_bob(&name).await.map_err(code), Err(ErrorCode::NotFound));

    let tagged = alice.tag_image(&name, "web").await.unwrap();
    assert_eq!((tagged.name.as_str(), tagged.owner.as_str()), ("web", "me"));
    assert_eq!(code(alice.tag_image(&name, "web").await.unwrap_err()), ErrorCode::NameTaken);
    assert_eq!(code(alice.tag_image(&name, "minimal").await.unwrap_err()), ErrorCode::NameTaken);
    assert_eq!(code(alice.share_image("web", "nobody").await.unwrap_err()), ErrorCode::NotFound);
    assert_eq!(alice.share_image("web", "bob").await.unwrap().shared_with, ["bob"]);

    // A shared image has its owner's name, so it can take no other image's place.
    assert_eq!(of_bob("web").await.map_err(code), Err(ErrorCode::NotFound));
    assert_eq!(of_bob("web@alice").await.unwrap(), "other");
    let listed = bob.list_images().await.unwrap();
    assert!(listed.iter().any(|image| image.name == "web@alice"), "{listed:?}");
    assert_eq!(code(bob.delete_image("web@alice").await.unwrap_err()), ErrorCode::Forbidden);
    assert_eq!(code(bob.delete_image("minimal").await.unwrap_err()), ErrorCode::Forbidden);
    if needs(Feature::OwnKernel) {
        bob.create(&CreateSandbox { name: Some("b".to_owned()), ..image_of("web@alice") })
            .await
            .unwrap();
        assert_eq!(code(alice.delete_image("web").await.unwrap_err()), ErrorCode::WrongState);
        bob.destroy("b").await.unwrap();
    }
    alice.unshare_image("web", "bob").await.unwrap();
    assert_eq!(of_bob("web@alice").await.map_err(code), Err(ErrorCode::NotFound));

    // An image counts against its owner's disk space: its layers, its files and its file system.
    let mut noise = vec![0; 40 << 20];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
    for (content, wanted) in [
        (noise, "has layers of 4"),
        (vec![7; 40 << 20], "bytes in its files; its owner has"),
        (vec![7; 17 << 20], "disk limit reached"),
    ] {
        place.registry.push("large:1", &[busybox(&[("a", 0o644, &content)])], &json!({})).await;
        let failed = place.pull_as(&bob, "large:1").await;
        let error = failed.error.unwrap();
        assert_eq!((failed.status.as_str(), error.code), ("failed", ErrorCode::QuotaExceeded));
        assert!(error.error.contains(wanted), "{}", error.error);
        let is_gone = || (place.built().len(), place.blobs()) == (1, 3);
        wait_for("what was refused to go", is_gone).await;
    }

    // The files go with the last image that has them.
    assert_eq!(place.pull_as(place.client(), "own:1").await.status, "done");
    let pruned = alice.prune_images().await.unwrap();
    assert_eq!(pruned.deleted, [name.clone(), "web".to_owned()]);
    assert_eq!((place.built().len(), place.blobs()), (1, 3));
    // An image of the admin is everybody's.
    assert_eq!(of_bob(&name).await.unwrap(), "other");
    let pruned = place.client().prune_images().await.unwrap();
    assert!(pruned.freed_bytes > 1 << 20, "{pruned:?}");
    assert_eq!((place.built().len(), place.blobs()), (0, 0));
}

/// Runs a program that must succeed, and returns what it prints.
async fn tool(program: &str, arguments: &[&str]) -> String {
    let mut command = bhatti_host::process::command(program);
    let ran = timeout(LIMIT, command.args(arguments).output()).await.unwrap().unwrap();
    assert!(ran.status.success(), "{program} {arguments:?}: {}", text(&ran.stderr));
    text(&ran.stdout)
}

/// Runs `docker` on the tests' own Docker. Returns `None` if there is none.
async fn docker(arguments: &[&str]) -> Option<String> {
    let socket = std::env::var("DOCKER_SOCK").ok().filter(|path| fs::exists(path).unwrap())?;
    Some(tool("docker", &[&["--host", &format!("unix://{socket}")], arguments].concat()).await)
}

#[tokio::test]
async fn exported_and_pushed_images_are_read_by_docker_and_skopeo() {
    let place = Place::new().await;
    let upper = tar(&[("etc/greeting", 0o644, b"hello\n"), (".wh.removed", 0o644, b"")]);
    let layers = [busybox(&[("removed", 0o644, b"old")]), Layer::plain(upper)];
    let config = json!({ "Cmd": ["/bin/cat", "/etc/greeting"], "Env": ["A=1"], "User": "7:7" });
    place.registry.push("team/app:1", &layers, &config).await;
    assert!(place.pull("team/app:1").await.status.success());
    let (name, client) = (place.reference("team/app:1"), place.client());
    client.tag_image(&name, "bhatti-test-export").await.unwrap();
    let file = place.images.path().join("export.tar");
    let file = file.to_str().unwrap();

    let export = ["image", "export", "bhatti-test-export", "-o", file];
    let exported = place.daemon.cli(&export).output().await.unwrap();

    assert!(exported.status.success(), "{}", text(&exported.stderr));
    let digests = async |image: &str, more: &[&str]| {
        let arguments = [&["inspect", "--no-tags"], more, &[image]].concat();
        let shown: Value = serde_json::from_str(&tool("skopeo", &arguments).await).unwrap();
        shown["Layers"].clone()
    };
    let plain = ["--tls-verify=false"];
    let original = digests(&format!("docker://{name}"), &plain).await;
    assert_eq!(original.as_array().unwrap().len(), 2);
    assert_eq!(digests(&format!("oci-archive:{file}"), &[]).await, original);
    // Docker names layers by their uncompressed content.
    let of_docker = digests(&format!("docker-archive:{file}"), &[]).await;
    assert_eq!(of_docker.as_array().unwrap().len(), 2);
    if docker(&["load", "-i", file]).await.is_some() {
        let ran = docker(&["run", "--rm", "--network", "none", "bhatti-test-export"]).await;
        assert_eq!(ran.unwrap(), "hello\n");
        let script = "id -u; id -g; echo $A; ls /removed 2>/dev/null; true";
        let run =
            ["run", "--rm", "--network", "none", "bhatti-test-export", "/bin/sh", "-c", script];
        assert_eq!(docker(&run).await.unwrap(), "7\n7\n1\n");
        docker(&["rmi", "bhatti-test-export"]).await;
    } else {
        bhatti_testkit::skip("Docker loads an exported image", "no Docker runs here");
    }

    let to = place.reference("copied/app:9");
    let pushed = place.daemon.cli(&["image", "push", "bhatti-test-export", &to]).output().await;
    let pushed = pushed.unwrap();
    assert!(pushed.status.success(), "{}", text(&pushed.stderr));
    let copied = format!("oci:{}:1", place.images.path().join("copied").display());
    let copy = ["--insecure-policy", "copy", "--src-tls-verify=false", "--preserve-digests"];
    tool("skopeo", &[&copy[..], &[&format!("docker://{to}"), &copied]].concat()).await;
    assert_eq!(digests(&copied, &[]).await, original);

    // An import of the export is the same image, and so is what it exports.
    let import = ["image", "import", "again", file];
    let imported = place.daemon.cli(&import).output().await.unwrap();
    assert!(imported.status.success(), "{}", text(&imported.stderr));
    assert_eq!(place.built().len(), 1);
    let again = client.inspect_image("again").await.unwrap();
    assert_eq!(again.config, client.inspect_image(&name).await.unwrap().config);
    let host =
        place.daemon.cli(&["image", "export", "minimal", "-o", file]).output().await.unwrap();
    assert!(text(&host.stderr).contains("has no layers"), "{}", text(&host.stderr));
}

#[tokio::test]
async fn sandbox_is_saved_as_an_image_whether_it_runs_or_not() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let place = Place::new().await;
    let config = json!({ "Env": ["GREETING=hello"], "WorkingDir": "/srv", "Cmd": ["sh"] });
    place.registry.push("base:1", &[busybox(&[("srv/old", 0o644, b"1")])], &config).await;
    let (name, client) = (place.reference("base:1"), place.client());
    client
        .create(&CreateSandbox { name: Some("one".to_owned()), ..image_of(&name) })
        .await
        .unwrap();
    let script = "busybox rm /srv/old; echo new >/srv/new; busybox chown 5:6 /srv/new; \
        busybox chmod 4750 /srv/new; busybox ln /srv/new /srv/link; busybox mkfifo /srv/pipe; \
        busybox mkdir -p /data/deep; busybox ln -s /srv/new /data/deep/to";
    run(client, "one", &["sh", "-c", script]).await.unwrap();
    let save = async |name: &str| {
        let saved = place.daemon.cli(&["image", "save", "one", name]).output().await.unwrap();
        assert!(saved.status.success(), "{}", text(&saved.stderr));
    };

    save("running").await;
    run(client, "one", &["sh", "-c", "echo later >/srv/later"]).await.unwrap();
    client.stop("one").await.unwrap();
    save("stopped").await;

    assert_eq!(client.inspect("one").await.unwrap().status, "stopped");
    for (image, later) in [("running", "absent"), ("stopped", "later")] {
        let request = CreateSandbox { name: Some(image.to_owned()), ..image_of(image) };
        client.create(&request).await.unwrap();
        let script = "busybox stat -c '%a %u %g %h' new; pwd; echo $GREETING; cat /data/deep/to; \
            busybox test -p pipe && echo pipe; busybox test -e old || echo gone; \
            cat later 2>/dev/null || echo absent; busybox ls /proc/1/exe /dev/null";
        let said = run(client, image, &["sh", "-c", script]).await.unwrap();
        let wanted =
            format!("4750 5 6 2\n/srv\nhello\nnew\npipe\ngone\n{later}\n/dev/null\n/proc/1/exe\n");
        assert_eq!(text(&said.stdout), wanted, "{image}: {}", text(&said.stderr));
        client.destroy(image).await.unwrap();
    }
    // A canceled save stops the sandbox again.
    let request = SaveImage { sandbox: "one".to_owned(), name: "canceled".to_owned() };
    let operation = client.save_image(&request).await.unwrap();
    let status = async || client.inspect("one").await.unwrap().status;
    while status().await == "stopped"
        && client.operation(&operation.id, 0).await.unwrap().status == "running"
    {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    client.cancel_operation(&operation.id).await.unwrap();
    timeout(LIMIT, async {
        while status().await != "stopped" {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    let taken = place.daemon.cli(&["image", "save", "one", "running"]).output().await.unwrap();
    assert!(text(&taken.stderr).contains("already exists"), "{}", text(&taken.stderr));
    // A saved image can be pushed.
    let to = place.reference("saved:1");
    let pushed = place.daemon.cli(&["image", "push", "running", &to]).output().await.unwrap();
    assert!(pushed.status.success(), "{}", text(&pushed.stderr));
    client.destroy("one").await.unwrap();
}

#[tokio::test]
async fn layers_of_another_user_are_used_only_by_who_can_download_them() {
    let place = Place::new().await;
    place.registry.push("secret:1", &[busybox(&[("key", 0o600, b"secret")])], &json!({})).await;
    let (alice, bob) = (place.user("alice", None).await, place.user("bob", None).await);
    assert_eq!(place.pull_as(&alice, "secret:1").await.status, "done");
    let image = alice.inspect_image(&place.reference("secret:1")).await.unwrap();

    // Whoever knows the image's description can serve it, without having the layer.
    place.registry.remove_largest_blob();

    let failed = place.pull_as(&bob, "secret:1").await;
    assert_eq!(failed.status, "failed", "{failed:?}");
    assert_eq!(bob.list_images().await.unwrap().iter().filter(|it| it.owner != "host").count(), 0);
    // The user who has the layer needs no other one.
    assert_eq!(place.pull_as(&alice, "secret:1").await.status, "done");
    let again = alice.inspect_image(&image.name).await.unwrap();
    assert_eq!(again.disk_bytes, image.disk_bytes);
    alice.share_image(&image.name, "bob").await.unwrap();
    assert_eq!(place.pull_as(&bob, "secret:1").await.status, "done");
    assert_eq!((place.built().len(), place.blobs()), (1, 3));
}

#[tokio::test]
async fn stored_logins_are_checked_and_used_for_pulls() {
    let mut place = Place::new().await;
    let registry = RealRegistry::start_private().await;
    registry.push("private:1", &[busybox(&[])], &json!({})).await;
    let authority = place.images.path().join("authority.pem");
    fs::write(&authority, registry.authority_pem()).unwrap();
    place.daemon.terminate().await;
    let config = place.daemon.data_dir().join("config.yaml");
    let text = fs::read_to_string(&config).unwrap().replace("plain_http: true, ", "");
    let text = format!("{text}registry_authorities: [{}]\n", authority.display());
    fs::write(&config, text).unwrap();
    place.daemon.serve().await;
    let (alice, bob) = (place.user("alice", None).await, place.user("bob", None).await);
    let pull = async |client: &Client| {
        let image = format!("{}/private:1", registry.server);
        let begun = client.pull_image(&PullImage { image, ..PullImage::default() }).await.unwrap();
        client.operation(&begun.id, 60).await.unwrap()
    };
    let login = |registry: &str, password: &str| SetRegistryLogin {
        registry: registry.to_owned(),
        username: "tester".to_owned(),
        password: password.to_owned(),
    };

    let denied = pull(&alice).await.error.unwrap();
    assert_eq!(denied.code, ErrorCode::NotFound, "{}", denied.error);
    for (login, expected) in [
        (login(&registry.server, "wrong"), ErrorCode::Forbidden),
        (login("not a registry", "secret"), ErrorCode::BadRequest),
        (login("name/below", "secret"), ErrorCode::BadRequest),
        (login("host:1:2", "secret"), ErrorCode::BadRequest),
        (login(&registry.server, ""), ErrorCode::BadRequest),
        (login(&registry.server, &"x".repeat(8193)), ErrorCode::BadRequest),
        (login(&bhatti_testkit::registry::unused_server(), "secret"), ErrorCode::PullFailed),
    ] {
        assert_eq!(code(alice.set_registry_login(&login).await.unwrap_err()), expected);
    }
    assert_eq!(alice.list_registry_logins().await.unwrap(), []);

    let kept = alice.set_registry_login(&login(&registry.server, "secret")).await.unwrap();

    assert_eq!((&*kept.registry, &*kept.username), (&*registry.server, "tester"));
    assert_eq!(alice.list_registry_logins().await.unwrap(), [kept]);
    assert_eq!(alice.list_secrets().await.unwrap(), []);
    assert_eq!(pull(&alice).await.status, "done");
    // A login is its owner's alone.
    assert_eq!(pull(&bob).await.status, "failed");
    assert_eq!(bob.list_registry_logins().await.unwrap(), []);
    let gone = bob.delete_registry_login(&registry.server).await.unwrap_err();
    assert_eq!(code(gone), ErrorCode::NotFound);
    // The store has no password in plain text.
    for file in ["state.db", "state.db-wal"] {
        let store = fs::read(place.daemon.data_dir().join(file)).unwrap_or_default();
        assert!(!store.windows(15).any(|window| window == b"tester\",\"secret"), "{file}");
    }
    alice.delete_registry_login(&registry.server).await.unwrap();
    assert_eq!(alice.list_registry_logins().await.unwrap(), []);
}

#[tokio::test]
async fn creation_that_is_refused_pulls_nothing() {
    let place = Place::new().await;
    let client = place.client();
    // It accepts connections, and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("{}/silent:1", silent.local_addr().unwrap());
    let named = CreateSandbox { name: Some("one".to_owned()), ..CreateSandbox::default() };
    client.create(&named).await.unwrap();

    let again = CreateSandbox { image: Some(image.clone()), ..named };
    assert_eq!(code(client.create(&again).await.unwrap_err()), ErrorCode::NameTaken);
    assert_eq!(client.create_or_return(&again).await.unwrap().image, "minimal");
    let secrets = vec!["MISSING".to_owned()];
    let without = CreateSandbox { secrets, ..image_of(&image) };
    assert_eq!(code(client.create(&without).await.unwrap_err()), ErrorCode::BadRequest);

    for image in [String::new(), "x".repeat(201)] {
        let request = PullImage { image, ..PullImage::default() };
        assert_eq!(code(client.pull_image(&request).await.unwrap_err()), ErrorCode::BadRequest);
    }
    assert_eq!(client.list_operations().await.unwrap(), []);
    client.destroy("one").await.unwrap();
}

#[tokio::test]
async fn longest_unused_pulled_image_is_evicted_and_others_stay() {
    let mut place = Place::new().await;
    for number in 1..=3 {
        let name = format!("evicted:{number}");
        let layer = busybox(&[("n", 0o644, &[number; 1000])]);
        place.registry.push(&name, &[layer], &json!({})).await;
    }
    assert!(place.pull("evicted:1").await.status.success());
    let first = place.reference("evicted:1");
    let bytes = place.client().inspect_image(&first).await.unwrap().disk_bytes;
    // Two images fit.
    let limit = (bytes * 5 / 2) >> 20;
    place.daemon.terminate().await;
    let config = place.daemon.data_dir().join("config.yaml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}pulled_images_mb: {limit}\n")).unwrap();
    place.daemon.serve().await;
    let client = place.client();
    let template = bhatti_api::CreateTemplate {
        name: "uses".to_owned(),
        image: Some(first.clone()),
        ..bhatti_api::CreateTemplate::default()
    };
    client.create_template(&template).await.unwrap();

    for name in ["evicted:2", "evicted:3"] {
        assert!(place.pull(name).await.status.success());
    }

    let is_there = async |number: u8| {
        let name = place.reference(&format!("evicted:{number}"));
        place.client().inspect_image(&name).await.is_ok()
    };
    // The first is in use, and the third is new.
    assert_eq!((is_there(1).await, is_there(2).await, is_there(3).await), (true, false, true));
    wait_for("its files to go", || (place.built().len(), place.blobs()) == (2, 6)).await;
}

#[tokio::test]
async fn pull_can_be_canceled_and_those_who_wait_for_it_are_told() {
    let place = Place::new().await;
    // It accepts connections, and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("{}/silent:1", silent.local_addr().unwrap());
    let client = place.client().clone();
    let request = PullImage { image: name.clone(), ..PullImage::default() };

    let operation = client.pull_image(&request).await.unwrap();

    assert_eq!(operation.status, "running");
    assert_eq!(client.pull_image(&request).await.unwrap().id, operation.id);
    let waiting = tokio::spawn({
        let (client, request) = (client.clone(), image_of(&name));
        async move { client.create(&request).await }
    });
    let other = place.user("other", None).await;
    assert_eq!(code(other.operation(&operation.id, 0).await.unwrap_err()), ErrorCode::NotFound);
    assert_eq!(client.cancel_operation(&operation.id).await.unwrap().status, "canceled");
    // It may have begun a pull of its own if it came late.
    let error = loop {
        if waiting.is_finished() {
            break waiting.await.unwrap().unwrap_err();
        }
        for running in client.list_operations().await.unwrap() {
            client.cancel_operation(&running.id).await.unwrap();
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(code(error), ErrorCode::PullFailed);
    assert_eq!(code(client.operation("0123", 0).await.unwrap_err()), ErrorCode::NotFound);

    // Ctrl+C cancels the pull of `bhatti image pull`.
    let mut command = place.daemon.cli(&["image", "pull", &name]);
    let process = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let runs = async || {
        let operations = client.list_operations().await.unwrap();
        operations.iter().any(|operation| operation.status == "running")
    };
    while !runs().await {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let pid = rustix::process::Pid::from_raw(process.id().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let ended = timeout(LIMIT, process.wait_with_output()).await.unwrap().unwrap();
    assert!(!ended.status.success() && text(&ended.stderr).contains("canceled"), "{ended:?}");
    assert!(!runs().await);
}

#[tokio::test]
async fn daemon_that_is_killed_while_it_pulls_leaves_no_half_image() {
    let mut place = Place::new().await;
    let layer = |byte: u8| busybox(&[("data", 0o644, &vec![byte; 30 << 20])]);
    let layers: Vec<Layer> = (0..3).map(layer).collect();
    place.registry.push("killed:1", &layers, &json!({})).await;
    let name = place.reference("killed:1");
    let images = place.directory();
    let has = |path: &str| {
        let (directory, prefix) = path.rsplit_once('/').unwrap_or(("", path));
        let entries = fs::read_dir(images.join(directory)).into_iter().flatten().flatten();
        entries.into_iter().any(|it| it.file_name().to_string_lossy().starts_with(prefix))
    };
    let build_has = |file: &str| {
        let entries = fs::read_dir(&images).unwrap().flatten();
        entries.into_iter().any(|it| {
            it.file_name().to_string_lossy().starts_with(".layers-")
                && it.path().join(file).exists()
        })
    };
    let steps: [(&str, &dyn Fn() -> bool); 5] = [
        ("a layer arrives", &|| has("blobs/partial/")),
        ("a layer has arrived", &|| has("blobs/sha256/")),
        ("a layer is unpacked", &|| build_has("root/data")),
        ("the file system is written", &|| build_has("root.ext4")),
        ("the file system is in place", &|| has("rootfs-oci")),
    ];
    for (step, reached) in steps {
        let request = PullImage { image: name.clone(), ..PullImage::default() };
        place.client().pull_image(&request).await.unwrap();
        wait_for(step, reached).await;

        place.daemon.kill().await;
        place.daemon.serve().await;

        let known = place.client().inspect_image(&name).await;
        if known.is_ok() {
            // It was killed after the end. That is the last step.
            assert_eq!(step, steps[4].0);
        }
    }
    let operation = place.pull_as(place.client(), "killed:1").await;
    assert_eq!(operation.status, "done", "{operation:?}");
    // A manifest, a configuration and three layers.
    assert_eq!((place.builds(), place.built().len(), place.blobs()), (Vec::new(), 1, 5));
    assert!(!has("blobs/partial/"));
    let shown = place.client().inspect_image(&name).await.unwrap();
    assert!(shown.disk_bytes > 30 << 20, "{shown:?}");
    if needs(Feature::OwnKernel) {
        let request = CreateSandbox { name: Some("one".to_owned()), ..image_of(&name) };
        place.client().create(&request).await.unwrap();
        let said = run(place.client(), "one", &["sh", "-c", "busybox wc -c <data"]).await.unwrap();
        assert_eq!(text(&said.stdout), format!("{}\n", 30 << 20));
        place.client().destroy("one").await.unwrap();
    }
}

#[tokio::test]
async fn hostile_and_false_images_are_refused_and_leave_nothing_behind() {
    let place = Place::new().await;
    let refused = async |layers: &[Layer], config: &Value, wanted: &str| {
        place.registry.push("bad/app:1", layers, config).await;
        let pulled = place.pull("bad/app:1").await;
        let said = text(&pulled.stderr);
        assert!(!pulled.status.success() && said.contains(wanted), "{said}");
        assert_eq!(place.builds(), Vec::<String>::new(), "{said}");
        assert_eq!(place.built(), Vec::<String>::new(), "{said}");
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
