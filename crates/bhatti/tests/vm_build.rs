//! Images that are built from Dockerfiles, in sandboxes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use bhatti_api::{BuildImage, CreateUser, ErrorCode, Operation};
use bhatti_client::{Client, ClientError, Upload};
use bhatti_testkit::registry::{RealRegistry, busybox};
use bhatti_testkit::{Api, LIMIT, Serve, TestDaemon, builder_images, own_images};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::timeout;

/// Lets the daemon use registries on loopback, and listen for users.
const CONFIG: &str =
    "listen: 127.0.0.1:0\nregistries:\n  127.0.0.1: {plain_http: true, private: true}\n";

/// A daemon that can build, a registry with the image `base:1`, and a context.
struct Place {
    _images: TempDir,
    daemon: TestDaemon,
    registry: RealRegistry,
    context: TempDir,
}

impl Place {
    async fn new() -> Self {
        let place = builder_images().await;
        let images = Some(place.path().join("images"));
        let serve = Serve { config: CONFIG.to_owned(), images, ..Serve::default() };
        let daemon = TestDaemon::start_with(serve).await;
        let registry = RealRegistry::start().await;
        let settings = json!({ "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"] });
        registry.push("base:1", &[busybox(&[])], &settings).await;
        Self { _images: place, daemon, registry, context: tempfile::tempdir().unwrap() }
    }

    /// Writes a file of the context. `BASE` in it stands for the image `base:1`.
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.context.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let base = format!("{}/base:1", self.registry.server);
        fs::write(&path, text.replace("BASE", &base)).unwrap();
        path
    }

    /// Runs `bhatti image build -t NAME` with these arguments and the context. Returns the exit
    /// code and what it said.
    async fn build(&self, name: &str, arguments: &[&str]) -> (i32, String) {
        let context = self.context.path().to_string_lossy().into_owned();
        let all = [&["image", "build", "-t", name][..], arguments, &[&context]].concat();
        self.cli(&all).await
    }

    /// Builds an image, which must succeed. Returns what was said.
    async fn built(&self, name: &str, arguments: &[&str]) -> String {
        let (code, said) = self.build(name, arguments).await;
        assert_eq!(code, 0, "{said}");
        said
    }

    async fn cli(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = self.daemon.cli(arguments);
        let ran = timeout(LIMIT, command.output()).await.unwrap().unwrap();
        let said = [ran.stdout, ran.stderr].concat();
        (ran.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
    }

    /// Runs a command in a new sandbox of an image, and returns what it wrote.
    async fn run(&self, image: &str, command: &[&str]) -> String {
        let (code, said) = self.cli(&[&["run", image, "--"][..], command].concat()).await;
        assert_eq!(code, 0, "{said}");
        said
    }

    fn client(&self) -> &Client {
        &self.daemon.client
    }

    /// Begins a build of a Dockerfile through the API, with an empty context.
    async fn begin(&self, client: &Client, dockerfile: &Path) -> Operation {
        let dockerfile = fs::read_to_string(dockerfile).unwrap();
        let request = BuildImage { name: "web".to_owned(), dockerfile, ..BuildImage::default() };
        client.build_image(&request, empty()).await.unwrap()
    }

    async fn sandboxes(&self) -> Vec<String> {
        let all = self.client().list().await.unwrap();
        all.into_iter().map(|sandbox| sandbox.name).collect()
    }
}

/// An archive without entries.
fn empty() -> Upload {
    Upload::new(std::io::Cursor::new(vec![0; 1024]), None)
}

/// Reads the log of an operation until it contains a text.
async fn wait_for_log(client: &Client, operation: &Operation, text: &str) {
    let mut log = client.operation_log(&operation.id, 0).await.unwrap();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains(text) {
        let piece = timeout(LIMIT, log.next()).await.unwrap().unwrap();
        said.extend(piece.expect("the operation goes on"));
    }
}

const SEVERAL_STAGES: &str = "\
ARG IMAGE=none
FROM $IMAGE AS made
COPY . /context
RUN <<END
echo $(id -u) >/who
ls /context >/listed
END
FROM BASE
ARG GREETING=none
ENV GREETING=$GREETING
COPY --from=made /who /listed /context/greeting /
RUN --mount=type=secret,id=token cat /run/secrets/token | busybox wc -c >/length
WORKDIR /home/app
USER 1000:1000
ENTRYPOINT [\"/bin/cat\", \"/who\", \"/listed\", \"/length\"]
CMD [\"/greeting\"]
";

#[tokio::test]
async fn image_is_built_from_a_dockerfile_in_a_sandbox() {
    let place = Place::new().await;
    let base = format!("IMAGE={}/base:1", place.registry.server);
    place.write("Dockerfile", SEVERAL_STAGES);
    place.write("greeting", "hello\n");
    place.write("left-out/file", "left out");
    place.write(".dockerignore", "left-out\nDockerfile\n");
    let token = tempfile::NamedTempFile::new().unwrap();
    fs::write(token.path(), "seventeen bytes.\n").unwrap();
    let secret = format!("id=token,src={}", token.path().display());
    // The daemon pulls the base, so the sandbox needs no network.
    let arguments = ["--network", "none", "--build-arg", &base, "--secret", &secret];
    let arguments = [&arguments[..], &["--build-arg", "GREETING=hi"]].concat();

    let said = place.built("web", &arguments).await;

    assert!(said.contains(&format!("pulling {}/base:1\n", place.registry.server)), "{said}");
    assert!(said.contains("[2/2] STEP 5/9: RUN --mount=type=secret"), "{said}");
    assert!(said.contains("built web ("), "{said}");
    assert!(!said.contains("Using cache"), "{said}");
    assert_eq!(place.run("web", &[]).await, "0\ngreeting\n17\nhello\n");
    let image = place.client().inspect_image("web").await.unwrap();
    let config = image.config.unwrap();
    assert_eq!(config.env.get("GREETING").map(String::as_str), Some("hi"));
    assert_eq!((&*config.user, &*config.workdir), ("1000:1000", "/home/app"));
    let archive = tempfile::NamedTempFile::new().unwrap();
    let path = archive.path().to_string_lossy().into_owned();
    let (code, said) = place.cli(&["image", "export", "web", "-o", &path]).await;
    assert_eq!(code, 0, "{said}");
    let mut archive = tar::Archive::new(fs::File::open(path).unwrap());
    for entry in archive.entries().unwrap() {
        let mut content = Vec::new();
        // Layers are compressed, and all other files are short.
        let mut unpacked = flate2::read::MultiGzDecoder::new(entry.unwrap());
        let _is_no_layer = unpacked.read_to_end(&mut content);
        assert!(!content.windows(15).any(|window| window == b"seventeen bytes"));
    }

    // The second build runs no step. It replaces the image, whose layers are those of the first.
    let layers = blobs(&place);
    let said = place.built("web", &arguments).await;
    let steps = said.lines().filter(|line| line.contains("STEP ") && !line.contains(": FROM "));
    let cached = said.lines().filter(|line| line.contains("Using cache"));
    assert_eq!(steps.count(), cached.count(), "{said}");
    assert_eq!(blobs(&place), layers);

    // A step that fails is named with its line, and the image stays as it was.
    place.write("Dockerfile", "FROM BASE\n\n# A comment.\nUSER 7:8\nRUN id -u; \\\n  exit 7\n");
    let (code, said) = place.build("web", &[]).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.lines().any(|line| line == "7"), "{said}");
    assert!(said.contains("error: line 5 of the Dockerfile failed with exit code 7"), "{said}");
    assert_eq!(place.sandboxes().await, Vec::<String>::new());
    assert_eq!(blobs(&place), layers);
    let volumes = place.client().list_volumes().await.unwrap();
    let cache = volumes.iter().find(|volume| volume.name == "build-cache").unwrap();
    assert!(cache.attached_to.is_empty(), "{cache:?}");
}

/// The names of the layers on disk.
fn blobs(place: &Place) -> Vec<String> {
    let directory = place._images.path().join("images/blobs/sha256");
    let entries = fs::read_dir(directory).unwrap().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn canceled_and_interrupted_builds_leave_no_sandbox() {
    let mut place = Place::new().await;
    let dockerfile = place.write("Dockerfile", "FROM BASE\nRUN echo begun; exec sleep 1000\n");
    let first = place.begin(place.client(), &dockerfile).await;
    wait_for_log(place.client(), &first, "begun").await;
    // Another build of this user waits. It ends with the daemon.
    let second = place.begin(place.client(), &dockerfile).await;
    assert_ne!(second.id, first.id);
    assert_eq!(place.sandboxes().await.len(), 1);

    let canceled = place.client().cancel_operation(&first.id).await.unwrap();

    assert_eq!(canceled.status, "canceled");
    wait_for_log(place.client(), &second, "begun").await;
    assert_eq!(place.sandboxes().await.len(), 1);

    place.daemon.kill().await;
    place.daemon.serve().await;

    let client = place.client().clone();
    let gone = async {
        while !client.list().await.unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, gone).await.unwrap();
    assert_eq!(client.inspect_image("web").await.map_err(code).err(), Some(ErrorCode::NotFound));
    // The cache is usable.
    place.write("Dockerfile", "FROM BASE\nCOPY Dockerfile /\n");
    place.built("web", &[]).await;
}

fn code(error: ClientError) -> ErrorCode {
    match error {
        ClientError::Refused(body) => body.code,
        error => panic!("{error}"),
    }
}

#[tokio::test]
async fn build_that_cannot_succeed_is_refused_before_it_begins() {
    let place = own_images().await;
    let images = Some(place.path().join("images"));
    let serve = Serve { config: CONFIG.to_owned(), images, ..Serve::default() };
    let daemon = TestDaemon::start_with(serve).await;
    let client = &daemon.client;
    let request = |dockerfile: &str| BuildImage {
        name: "web".to_owned(),
        dockerfile: dockerfile.to_owned(),
        ..BuildImage::default()
    };
    let refused = async |request: &BuildImage| {
        let refused = client.build_image(request, empty()).await.unwrap_err();
        let ClientError::Refused(body) = refused else { panic!("{refused}") };
        (body.code, body.error)
    };
    let long = BTreeMap::from([("A".to_owned(), "x".repeat(70_000))]);
    let path = BTreeMap::from([("../x".to_owned(), String::new())]);
    for (request, said) in [
        (request("FRUM a\n"), "invalid Dockerfile"),
        (request(""), "invalid Dockerfile"),
        (BuildImage { target: Some("none".to_owned()), ..request("FROM a\n") }, "stage `none`"),
        (BuildImage { name: "no name".to_owned(), ..request("FROM a\n") }, "no name"),
        (BuildImage { args: long, ..request("FROM a\n") }, "invalid argument `A`"),
        (BuildImage { secrets: path, ..request("FROM a\n") }, "invalid secret `../x`"),
        (BuildImage { pull: Some("x".to_owned()), ..request("FROM a\n") }, "`x`"),
        (request(&"#".repeat((1 << 20) + 1)), "1048576"),
    ] {
        let (code, error) = refused(&request).await;
        assert_eq!(code, ErrorCode::BadRequest, "{error}");
        assert!(error.contains(said), "{error}");
    }
    let expected = (ErrorCode::NotSetUp, "no image `builder` has been built");
    let (code, error) = refused(&request("FROM a\n")).await;
    assert_eq!((code, &*error), expected);
    // What comes before the files is kept in memory, so it has a limit.
    let api = Api::admin(&daemon);
    let kind = ("content-type", "multipart/form-data; boundary=b");
    for path in ["/images/build", "/templates/build"] {
        for form in ["x".repeat(6 << 20), format!("--b\r\nA: {}", "x".repeat(6 << 20))] {
            let refused = api.send("POST", path, &[kind], form.into_bytes()).await;
            assert_eq!(refused.status, 400, "{path}: {}", refused.text());
        }
        let refused = api.send("POST", path, &[kind], b"--b--\r\n".to_vec()).await;
        assert!(refused.text().contains("no part `build`"), "{}", refused.text());
    }
    assert_eq!(client.list_operations().await.unwrap(), []);
    let files = fs::read_dir(place.path().join("images")).unwrap().flatten();
    let left = files.filter(|file| file.file_name().to_string_lossy().starts_with(".layers-"));
    assert_eq!(left.count(), 0);
    let user = CreateUser { name: "bob".to_owned(), ..CreateUser::default() };
    client.create_user(&user).await.unwrap();
}

/// Each kind of Dockerfile: what it is, the file, arguments, and the output of the image's
/// command.
const KINDS: [(&str, &str, &[&str], &str); 9] = [
    (
        "an argument before FROM, and a copy from another image",
        "ARG TAG=1\nFROM scratch\nCOPY --from=BASE /bin /bin\nENV PATH=/bin\nCMD [\"echo\", \"one\"]\n",
        &[],
        "one\n",
    ),
    (
        "a stage that is chosen",
        "FROM BASE AS first\nRUN echo first >/it\nCMD cat /it\nFROM first\nRUN exit 1\n",
        &["--target", "first"],
        "first\n",
    ),
    (
        "files that are here documents",
        "FROM BASE\nCOPY <<ONE <<TWO /files/\none $PATH\nONE\ntwo\nTWO\nCMD cat /files/ONE /files/TWO\n",
        &[],
        "one /bin\ntwo\n",
    ),
    (
        "steps of a user, in a directory",
        "FROM BASE\nWORKDIR /w\nRUN busybox chown 7:8 /w\nUSER 7:8\nRUN id -u >who; id -g >>who\nCMD cat who\n",
        &[],
        "7\n8\n",
    ),
    (
        "mounts of a cache, memory, and another stage",
        "FROM BASE AS other\nRUN echo other >/it\nFROM BASE\nRUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/t --mount=type=bind,from=other,target=/o cp=$(cat /o/it); echo $cp >/it; echo x >/c/x; echo y >/t/y\nCMD cat /it; echo /c/* /t/*\n",
        &[],
        "other\n/c/* /t/*\n",
    ),
    (
        "another shell and an entrypoint as one text",
        "FROM BASE\nSHELL [\"/bin/busybox\", \"sh\", \"-e\", \"-c\"]\nRUN echo shell >/it\nENTRYPOINT cat /it\n",
        &[],
        "shell\n",
    ),
    (
        "an archive that is added, with an owner and a mode",
        "FROM BASE\nADD --chown=3:4 archive.tar /added/\nCOPY --chmod=640 one /one\nCMD busybox stat -c '%u:%g %a' /added/inside /one\n",
        &[],
        "0:0 644\n0:0 640\n",
    ),
    (
        "comments, continued lines and another escape",
        "# escape=`\nFROM BASE\n# comment\nRUN echo a `\n# within\n  b >/it\nCMD cat /it\n",
        &[],
        "a b\n",
    ),
    (
        "arguments in places",
        "FROM BASE\nARG A=1\nARG B\nENV C=${A}${B:-none}\nLABEL a=$A\nRUN echo $A $B $C >/it\nCMD cat /it\n",
        &["--build-arg", "B=2"],
        "1 2 12\n",
    ),
];

#[tokio::test]
async fn many_kinds_of_dockerfiles_are_built() {
    let place = Place::new().await;
    place.write("one", "one\n");
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(6);
    header.set_mode(0o644);
    archive.append_data(&mut header, "inside", &b"inside"[..]).unwrap();
    fs::write(place.context.path().join("archive.tar"), archive.into_inner().unwrap()).unwrap();
    for (kind, dockerfile, arguments, expected) in KINDS {
        place.write("Dockerfile", dockerfile);
        let (code, said) = place.build("web", arguments).await;
        assert_eq!(code, 0, "{kind}: {said}");
        assert_eq!(place.run("web", &[]).await, expected, "{kind}");
    }
}
