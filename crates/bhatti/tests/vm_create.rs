//! Contents of a new sandbox: files up to the size limit, a root disk of the requested size, and
//! the certificate authorities that its image trusts.

use std::io::Write;

use bhatti_api::CreateSandbox;
use bhatti_testkit::{Api, Feature, LIMIT, Serve, TestDaemon, named, needs, run};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::time::{sleep, timeout};

/// Limit of the total content of a new sandbox's files, in bytes.
const FILES_BYTES_MAX: usize = 16 << 20;

#[tokio::test]
async fn large_files_are_there_before_the_init_script_runs() {
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let place = tempfile::tempdir().unwrap();
    let large = place.path().join("large");
    // Every eight bytes differ, so a missing or repeated piece changes the hash.
    let mut file = std::io::BufWriter::new(std::fs::File::create(&large).unwrap());
    for number in 0..(12 << 20) / 8_u64 {
        file.write_all(&number.to_le_bytes()).unwrap();
    }
    drop(file);
    let expected = bhatti_host::process::command("sha256sum").arg(&large).output().await.unwrap();
    let expected = String::from_utf8(expected.stdout).unwrap();
    let tool = place.path().join("tool");
    std::fs::write(&tool, "#!/bin/sh\nsha256sum /srv/data/large | cut -d' ' -f1\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&tool, executable).unwrap();

    for how in [None, Some("--cold-boot")] {
        let mut create =
            daemon.cli(&["create", "--name", "dev", "--init", "/opt/tool >/tmp/sum 2>&1"]);
        create.args(how).arg("--file").arg(format!("{}:/opt/tool", tool.display()));
        create.arg("--file").arg(format!("{}:/srv/data/large", large.display()));
        let created = create.output().await.unwrap();
        assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));

        let wait = "until [ -s /tmp/sum ]; do sleep 0.05; done; cat /tmp/sum";
        assert_eq!(
            api.sh("dev", wait).await.trim(),
            expected.split(' ').next().unwrap(),
            "{how:?}"
        );
        let facts = "stat -c '%U %a' /srv/data /srv/data/large /opt/tool";
        assert_eq!(api.sh("dev", facts).await, "user 755\nuser 644\nuser 755\n");
        assert_eq!(api.call("DELETE", "/sandboxes/dev", &json!({})).await.status, 200);
    }
}

#[tokio::test]
async fn files_over_the_total_limit_are_refused_before_creation() {
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let place = tempfile::tempdir().unwrap();
    let large = place.path().join("large");
    std::fs::File::create(&large).unwrap().set_len(FILES_BYTES_MAX as u64).unwrap();
    std::fs::write(place.path().join("small"), "1").unwrap();

    let mut create = daemon.cli(&["create", "--name", "dev"]);
    for name in ["large", "small"] {
        create.arg("--file").arg(format!("{}/{name}:/srv/{name}", place.path().display()));
    }
    let refused = create.output().await.unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(said.contains("more than 16 MiB") && said.contains("bhatti cp"), "{said}");

    let file = |bytes| json!({ "path": format!("/srv/{bytes}"), "content": "x".repeat(bytes) });
    let request = json!({ "name": "dev", "files": [file(FILES_BYTES_MAX), file(1)] });
    let answer = api.call("POST", "/sandboxes", &request).await;
    assert_eq!(answer.refusal(), (413, "body_too_large".to_owned()));
    assert!(answer.text().contains("16777217 bytes together"), "{}", answer.text());
    let request = json!({ "name": "x".repeat(30 << 20) });
    let answer = api.call("POST", "/sandboxes", &request).await;
    assert_eq!(answer.refusal(), (413, "body_too_large".to_owned()));
    assert_eq!(api.get("/sandboxes").await.json(), json!([]));
}

#[tokio::test]
async fn long_requests_of_one_user_take_limited_memory() {
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let announced = FILES_BYTES_MAX;
    let mut held = Vec::new();
    let refused = async {
        loop {
            let mut connection = BufReader::new(api.connect().await);
            let head = format!(
                "POST /sandboxes HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {announced}\r\n\r\n"
            );
            connection.write_all(head.as_bytes()).await.unwrap();
            // The daemon sends `100 Continue` once it has reserved memory for the body.
            let mut line = String::new();
            connection.read_line(&mut line).await.unwrap();
            if !line.starts_with("HTTP/1.1 100") {
                return line;
            }
            held.push(connection);
        }
    };

    let refused = timeout(LIMIT, refused).await.unwrap();

    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert_eq!(held.len(), 2, "64 MiB have room for two requests of 32 MiB each");
    let small = api.call("POST", "/sandboxes", &json!({ "name": "dev" })).await;
    assert_eq!(small.status, 201, "{}", small.text());
    held.clear();
    let large = json!({ "name": "large", "files": [{ "path": "/srv/large", "content": "x".repeat(2 << 20) }] });
    let given_back = async {
        while api.call("POST", "/sandboxes", &large).await.status == 503 {
            sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(LIMIT, given_back).await.unwrap();
    assert_eq!(api.sh("large", "wc -c </srv/large").await.trim(), (2 << 20).to_string());
}

#[tokio::test]
async fn image_trusts_the_authorities_it_was_built_with() {
    let place = bhatti_testkit::repository().join("target/test-data-containers");
    let serve = Serve { images: Some(place.join("images")), ..Serve::default() };
    let daemon = TestDaemon::start_with(serve).await;
    let api = Api::admin(&daemon);
    let mut create = daemon.cli(&["create", "--name", "dev", "--image", "containers", "--file"]);
    create.arg(format!("{}:/opt/server.pem", place.join("tls/server.pem").display()));
    let created = create.output().await.unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let server = r#"
cat >/tmp/server.py <<'END'
import http.server, ssl
server = http.server.HTTPServer(('127.0.0.1', 8443), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('/opt/server.pem')
server.socket = context.wrap_socket(server.socket, server_side=True)
print('ready', flush=True)
server.serve_forever()
END
python3 /tmp/server.py >/tmp/ready 2>/tmp/log &
until [ -s /tmp/ready ]; do sleep 0.05; done"#;
    api.sh("dev", server).await;

    let asks = "
        curl -sS -o /dev/null -w '%{http_code}\n' https://localhost:8443/
        python3 -c \"import urllib.request as r; print(r.urlopen('https://localhost:8443/').status)\"
        env | grep -c '=/etc/ssl/certs/ca-certificates.crt$'";
    assert_eq!(api.sh("dev", asks).await, "200\n200\n4\n");
}

#[tokio::test]
async fn root_disk_keeps_its_requested_size_in_restarts_and_forks() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let size = "df --output=size -m / | tail -1";
    let mebibytes = async |name: &str| api.sh(name, size).await.trim().parse::<u32>().unwrap();
    let request = json!({ "name": "forked", "disk_mb": 20480 });
    let created = api.call("POST", "/sandboxes", &request).await;
    assert_eq!((created.status.as_u16(), &created.json()["disk_mb"]), (201, &json!(20480)));
    let booted =
        api.call("POST", "/sandboxes", &json!({ "name": "booted", "disk_mb": 6000 })).await;
    let origin = booted.json()["origin"].as_str().unwrap().to_owned();
    assert_eq!(
        origin,
        "boot, because its memory is not a multiple of 64 MiB, or its disk size is not a multiple of 1024 MiB"
    );

    // The file system reserves some of its disk.
    assert!((19_500..20_480).contains(&mebibytes("forked").await));
    assert!((5_600..6_000).contains(&mebibytes("booted").await));
    api.sh("forked", "head -c 1M /dev/urandom >/workspace/file; sync").await;
    assert_eq!(api.call("POST", "/sandboxes/forked/stop", &json!({})).await.status, 200);
    assert_eq!(api.call("POST", "/sandboxes/forked/start", &json!({})).await.status, 200);
    let fork = json!({ "name": "child" });
    let forked = api.call("POST", "/sandboxes/forked/fork", &fork).await;
    assert_eq!(forked.status, 201, "{}", forked.text());
    assert!((19_500..20_480).contains(&mebibytes("child").await));
    assert_eq!(api.get("/sandboxes/child").await.json()["disk_mb"], 20480);
    let check = "df --output=size -m / | tail -1; wc -c </workspace/file";
    let restart = json!({ "cold_boot": true });
    assert_eq!(api.call("POST", "/sandboxes/child/stop", &json!({})).await.status, 200);
    assert_eq!(api.call("POST", "/sandboxes/child/start", &restart).await.status, 200);
    assert!(api.sh("child", check).await.ends_with("\n1048576\n"));
    assert!((19_500..20_480).contains(&mebibytes("child").await));
}

#[tokio::test]
async fn invalid_disk_size_is_refused_with_the_valid_range() {
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let api = Api::admin(&daemon);
    for (disk, expected) in [
        (json!(255), "disk_mb must be between 256 and 4194304, not 255"),
        (json!(5_000_000), "disk_mb must be between 256 and 4194304, not 5000000"),
        (json!(4095), "disk_mb must be at least 4096 for image `minimal`, not 4095"),
    ] {
        let answer = api.call("POST", "/sandboxes", &json!({ "disk_mb": disk })).await;
        assert_eq!(answer.status, 400);
        assert!(answer.text().contains(expected), "{}", answer.text());
    }
    let user = json!({ "name": "small", "max_disk_mb": 8192 });
    let key =
        api.call("POST", "/users", &user).await.json()["api_key"].as_str().unwrap().to_owned();
    let theirs = Api::tcp(daemon.api_address(), Some(&key));
    let answer = theirs.call("POST", "/sandboxes", &json!({ "disk_mb": 8193 })).await;
    assert!(
        answer.text().contains("8192 MiB that sandboxes, snapshots and images may take"),
        "{}",
        answer.text()
    );
    assert_eq!(theirs.get("/sandboxes").await.json(), json!([]));
    assert_eq!(api.get("/sandboxes").await.json(), json!([]));
}

#[tokio::test]
async fn guest_boots_if_the_snapshot_before_its_root_disk_is_damaged() {
    const MADE: &str = "Made a snapshot of a guest before its root disk base=\"";
    if !needs(Feature::ReplacedRoot) {
        return;
    }
    let config = "ready_vmms: 0\nready_forks: 0\nnetwork: off\n".to_owned();
    let mut daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    daemon.terminate().await;
    // The base snapshots of other tests must stay whole.
    let bases = daemon.data_dir().join("templates");
    std::fs::remove_file(&bases).unwrap();
    std::fs::create_dir(&bases).unwrap();
    daemon.serve().await;
    let create = async |name: &str, disk| {
        let request = CreateSandbox { disk_mb: Some(disk), ..named(name) };
        daemon.client.create(&request).await.unwrap();
        assert_eq!(run(&daemon.client, name, &["echo", "here"]).await.unwrap().stdout, b"here\n");
        daemon.client.destroy(name).await.unwrap();
    };
    let made = || daemon.log().matches(MADE).count();
    create("first", 5120).await;
    let log = daemon.log();
    let key = log.split(MADE).nth(1).unwrap().split('"').next().unwrap();
    let state = bases.join(key).join("device.state");
    // The file may be read-only.
    std::fs::remove_file(&state).unwrap();
    std::fs::write(&state, "damaged").unwrap();

    create("second", 6144).await;

    let log = daemon.log();
    assert!(log.contains("before its root disk: booting it"), "{log}");
    assert!(!state.exists());
    assert_eq!(made(), 1);
    create("third", 7168).await;
    assert!(state.exists());
    assert_eq!(made(), 2);
}
