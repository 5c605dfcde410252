//! Files in a real guest.

use bhatti_testkit::{Api, LIMIT, TestDaemon};
use bytes::Bytes;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

#[tokio::test]
async fn files_are_read_written_listed_and_removed() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let files = "/sandboxes/dev/files";
    let content: Vec<u8> = (0..300_000u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
    let put = async |query: &str, body: &[u8]| {
        api.send("PUT", &format!("{files}?path={query}"), &[], Bytes::copy_from_slice(body)).await
    };
    assert_eq!(put("/workspace/d/f&mode=0640", &content).await.json(), json!({ "status": "ok" }));
    let read = api.get(&format!("{files}?path=/workspace/d/f")).await;
    assert!(read.body == content);
    assert_eq!(read.headers["x-file-size"], "300000");
    let head = api.send("HEAD", &format!("{files}?path=/workspace/d/f"), &[], "").await;
    let header = |name: &str| head.headers[name].to_str().unwrap().to_owned();
    assert_eq!(
        [header("x-file-size"), header("x-file-mode"), header("x-file-isdir")],
        ["300000", "0640", "false"]
    );
    put("/workspace/lines", b"one\ntwo\nthree\n").await;
    for (query, part) in [
        ("offset=2", "two\nthree\n"),
        ("limit=1", "one\n"),
        ("offset=2&limit=1", "two\n"),
        ("max_bytes=5", "one\nt"),
    ] {
        let read = api.get(&format!("{files}?path=/workspace/lines&{query}")).await;
        assert_eq!(
            (read.text().as_str(), &read.headers["x-file-size"]),
            (part, &"14".parse().unwrap()),
            "{query}"
        );
    }
    let list = api.get(&format!("{files}?path=/workspace&ls=true")).await.json();
    let names: Vec<_> =
        list.as_array().unwrap().iter().map(|entry| entry["name"].clone()).collect();
    assert_eq!(names, ["d", "lines"]);

    let call = async |method: &str, path: &str, body: Value| api.call(method, path, &body).await;
    let mkdir = json!({ "path": "/workspace/a/b", "parents": true });
    assert_eq!(call("POST", &format!("{files}/mkdir"), mkdir).await.status, 200);
    let rename = json!({ "from": "/workspace/lines", "to": "/workspace/a/b/lines" });
    assert_eq!(call("POST", &format!("{files}/rename"), rename.clone()).await.status, 200);
    for (method, path, body, refusal) in [
        ("GET", "?path=/nope", Value::Null, (404, "not_found")),
        ("GET", "?path=/workspace", Value::Null, (409, "not_a_file")),
        ("GET", "?path=/dev/zero", Value::Null, (409, "not_a_file")),
        ("GET", "?path=/etc/passwd&ls=true", Value::Null, (409, "not_a_directory")),
        ("GET", "?path=/workspace&ls=true&limit=1", Value::Null, (400, "bad_request")),
        ("GET", "", Value::Null, (400, "bad_request")),
        ("GET", "?path=/etc/passwd&offset=-1", Value::Null, (400, "bad_request")),
        ("PUT", "?path=/workspace", Value::Null, (409, "not_a_file")),
        ("PUT", "?path=/x&mode=999", Value::Null, (400, "bad_request")),
        ("DELETE", "?path=/workspace/a", Value::Null, (409, "not_empty")),
        ("DELETE", "?path=/nope", Value::Null, (404, "not_found")),
        ("POST", "/mkdir", json!({ "path": "/workspace/a" }), (409, "already_exists")),
        ("POST", "/rename", rename, (404, "not_found")),
    ] {
        let refused = call(method, &format!("{files}{path}"), body).await;
        assert_eq!(
            refused.refusal(),
            (refusal.0, refusal.1.to_owned()),
            "{method} {path}: {}",
            refused.text()
        );
    }
    let remove = format!("{files}?path=/workspace/a&recursive=true");
    assert_eq!(call("DELETE", &remove, Value::Null).await.status, 200);
}

#[tokio::test]
async fn files_belong_to_the_sandbox_user_and_keep_owner_and_mode() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let files = "/sandboxes/dev/files";
    let put = async |path: &str| {
        api.send("PUT", &format!("{files}?path={path}"), &[], "new").await.status.as_u16()
    };
    let root = async |script: &str| {
        let exec = json!({ "cmd": ["sh", "-c", script], "user": "root" });
        api.call("POST", "/sandboxes/dev/exec", &exec).await.json()["stdout"].clone()
    };

    // Directories that a call creates belong to the user, who can write in them.
    assert_eq!(put("/workspace/a/b/c").await, 200);
    let mkdir = json!({ "path": "/workspace/d/e", "parents": true });
    assert_eq!(api.call("POST", &format!("{files}/mkdir"), &mkdir).await.status, 200);
    let archive = api.get("/sandboxes/dev/tar?path=/workspace/a").await.body;
    let unpacked = api.send("PUT", "/sandboxes/dev/tar?path=/workspace/f/g", &[], archive).await;
    assert_eq!(unpacked.status, 200);
    let script = "cd /workspace && touch a/x a/b/x d/x d/e/x f/x f/g/x f/g/b/x && echo fine";
    assert_eq!(api.sh("dev", script).await, "fine\n");

    // An existing file keeps its owner and mode. A file that the user may not write is refused.
    root(
        "cd /workspace && printf x >script && chmod 755 script && chown 1000:1000 script \
          && printf x >shared && chmod 664 shared && chown root:1000 shared \
          && printf x >roots && ln -s script link && mkfifo pipe && chmod 666 pipe",
    )
    .await;
    for (path, status) in
        [("script", 200), ("link", 200), ("shared", 200), ("roots", 403), ("pipe", 409)]
    {
        assert_eq!(put(&format!("/workspace/{path}")).await, status, "{path}");
    }
    assert_eq!(put("/workspace/roots&user=root").await, 200);
    assert_eq!(put("/etc/new").await, 403);
    assert_eq!(put("/etc/new&user=nobody-at-all").await, 400);
    let facts = api.sh("dev", "cd /workspace && stat -c '%n %U:%G %a' script shared roots && cat script; stat -c %F link pipe").await;
    assert_eq!(
        facts,
        "script user:user 755\nshared root:user 664\nroots root:root 644\nnewsymbolic link\nfifo\n"
    );
    // The mode of a directory of root is reported with its sticky bit.
    let head = api.send("HEAD", &format!("{files}?path=/tmp"), &[], "").await;
    assert_eq!(head.headers["x-file-mode"], "1777");

    // A file that the user cannot read is an error, not an incomplete archive.
    root("install -m 600 /etc/hostname /workspace/a/secret").await;
    let refused = api.get("/sandboxes/dev/tar?path=/workspace/a").await;
    assert_eq!(refused.status, 403, "{}", refused.text());
    assert!(refused.text().contains("/workspace/a/secret"), "{}", refused.text());
    assert_eq!(api.get("/sandboxes/dev/tar?path=/workspace/a&user=root").await.status, 200);
}

#[tokio::test]
async fn watched_directory_reports_its_changes_and_its_removal() {
    let (daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    api.sh("dev", "mkdir -p /workspace/w /root-only; touch /workspace/w/old").await;
    api.exec(
        "dev",
        json!({ "cmd": ["sh", "-c", "mkdir /shut && chmod 700 /shut"], "user": "root" }),
    )
    .await;
    let watch = "/sandboxes/dev/files/watch?path=";
    for (path, refusal) in [("/nope", (404, "not_found")), ("/shut", (403, "permission_denied"))] {
        let refused = api.get(&format!("{watch}{path}")).await;
        assert_eq!(refused.refusal(), (refusal.0, refusal.1.to_owned()), "{path}");
    }
    let answer = api.begin("GET", &format!("{watch}/workspace/w"), &[], "").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let mut command = daemon.cli(&["file", "watch", "dev", "/workspace/w"]);
    let mut printing =
        command.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = tokio::io::BufReader::new(printing.stdout.take().unwrap());
    let mut printed = String::new();
    // Changes the directory until the command prints one, so that its watch is known to be active.
    while printed.is_empty() {
        api.sh("dev", "touch /workspace/w/old").await;
        let read = tokio::io::AsyncBufReadExt::read_line(&mut lines, &mut printed);
        drop(timeout(std::time::Duration::from_millis(300), read).await);
    }
    assert!(printed.ends_with("\told\n"), "{printed}");

    api.sh(
        "dev",
        "cd /workspace/w && echo x >new && mv new newer && rm newer old && cd .. && rmdir w",
    )
    .await;

    let body = timeout(LIMIT, answer.into_body().collect()).await.unwrap().unwrap().to_bytes();
    let changes: Vec<Value> = body
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    for wanted in [
        json!({ "kind": "created", "name": "new" }),
        json!({ "kind": "modified", "name": "new" }),
        json!({ "kind": "created", "name": "newer" }),
        json!({ "kind": "removed", "name": "old" }),
        json!({ "kind": "removed" }),
    ] {
        assert!(changes.contains(&wanted), "{wanted}: {changes:?}");
    }
    assert!(timeout(LIMIT, printing.wait()).await.unwrap().unwrap().success());
}

#[tokio::test]
async fn oversized_listing_is_refused_and_the_sandbox_keeps_working() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    // The link targets alone are ten times the size limit of a listing.
    let script = "import os\nos.mkdir('/workspace/m')\nfor i in range(20000): os.symlink('x' * 4000, f'/workspace/m/{i}')";
    let exec = json!({ "cmd": ["python3", "-c", script] });
    assert_eq!(api.call("POST", "/sandboxes/dev/exec", &exec).await.json()["exit_code"], 0);

    let listed = api.get("/sandboxes/dev/files?path=/workspace/m&ls=true").await;

    assert_eq!(listed.refusal(), (413, "output_too_large".to_owned()), "{}", listed.text());
    assert_eq!(api.sh("dev", "echo alive").await, "alive\n");
}

#[tokio::test]
async fn upload_is_whole_or_not_at_all() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let files = "/sandboxes/dev/files";
    let path = format!("{files}?path=/workspace/d/f");
    assert_eq!(api.send("PUT", &path, &[], "old").await.status, 200);

    let mut cut = api.connect().await;
    let begin = format!(
        "PUT {files}?path=/workspace/d/f HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nnew"
    );
    cut.write_all(begin.as_bytes()).await.unwrap();
    drop(cut);
    let temporary = "ls -A /workspace/d";
    let settled = async { while api.sh("dev", temporary).await != "f\n" {} };
    timeout(LIMIT, settled).await.unwrap();
    assert!(api.get(&format!("{files}?path=/workspace/d/f")).await.body == "old");

    // An upload without a content length.
    let mut chunked = api.connect().await;
    let begin = format!(
        "PUT {files}?path=/workspace/d/f HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nnew\r\n5\r\n file\r\n0\r\n\r\n"
    );
    chunked.write_all(begin.as_bytes()).await.unwrap();
    let mut answer = String::new();
    chunked.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(api.get(&format!("{files}?path=/workspace/d/f")).await.text(), "new file");
}

#[tokio::test]
async fn refused_upload_is_drained_so_that_the_client_reads_the_error() {
    const LENGTH: usize = 64 << 20;
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    for more in ["", "Connection: close\r\n"] {
        let mut up = api.connect().await;
        let head = format!(
            "PUT /sandboxes/nobody/files?path=/x HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {LENGTH}\r\n\r\n"
        );
        up.write_all(head.as_bytes()).await.unwrap();
        up.write_all(&vec![0; LENGTH]).await.unwrap();
        let mut answer = [0; 12];
        up.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 404", "{more}");
    }
}

#[tokio::test]
async fn directories_are_downloaded_and_uploaded_as_archives() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    api.sh("dev", "mkdir -p /workspace/a/b && echo one >/workspace/a/1 && echo two >/workspace/a/b/2 && chmod 700 /workspace/a/b/2").await;

    let archive = api.get("/sandboxes/dev/tar?path=/workspace/a").await;
    assert_eq!(
        (archive.status.as_u16(), &archive.headers["content-type"]),
        (200, &"application/x-tar".parse().unwrap())
    );
    let put = api.send("PUT", "/sandboxes/dev/tar?path=/workspace/new/c", &[], archive.body).await;
    assert_eq!(put.json(), json!({ "status": "ok" }));

    assert_eq!(
        api.sh("dev", "diff -r /workspace/a /workspace/new/c; stat -c %a /workspace/new/c/b/2")
            .await,
        "700\n"
    );
    for (path, refusal) in
        [("/nope", (404, "not_found")), ("/etc/passwd", (409, "not_a_directory"))]
    {
        let refused = api.get(&format!("/sandboxes/dev/tar?path={path}")).await;
        assert_eq!(refused.refusal(), (refusal.0, refusal.1.to_owned()), "{path}");
    }
    let nonsense =
        api.send("PUT", "/sandboxes/dev/tar?path=/workspace/x", &[], "no archive at all").await;
    assert_eq!(nonsense.refusal(), (400, "bad_request".to_owned()));
}

#[tokio::test]
async fn large_file_goes_up_and_down_in_constant_memory() {
    // Eight times the memory by which the daemon may grow.
    const BYTES: u64 = 256 << 20;
    let (daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let before = bhatti_testkit::resident_mib(daemon.pid());
    let mut up = api.connect().await;
    let head = format!(
        "PUT /sandboxes/dev/files?path=/workspace/large HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {BYTES}\r\n\r\n"
    );
    up.write_all(head.as_bytes()).await.unwrap();
    let piece = vec![0x5a; 1 << 20];
    let (mut peak, mut sent) = (0, 0);
    while sent < BYTES {
        up.write_all(&piece).await.unwrap();
        sent += piece.len() as u64;
        peak = peak.max(bhatti_testkit::resident_mib(daemon.pid()));
    }
    let mut answer = String::new();
    up.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains(r#"{"status":"ok"}"#), "{answer}");

    let mut body =
        api.begin("GET", "/sandboxes/dev/files?path=/workspace/large", &[], "").await.into_body();
    let mut received = 0;
    while let Some(frame) = body.frame().await {
        let bytes = frame.unwrap().into_data().unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0x5a));
        received += bytes.len() as u64;
        peak = peak.max(bhatti_testkit::resident_mib(daemon.pid()));
    }
    assert_eq!(received, BYTES);
    assert!(peak < before + 32, "the daemon grew from {before} to {peak} MiB");
}
