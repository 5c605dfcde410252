//! The API of a real daemon, where no VM is needed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bhatti_api::{CreateSandbox, CreateUser, ErrorCode, SetSecret};
use bhatti_client::{Client, ClientError};
use bhatti_testkit::{Serve, TestDaemon, dist, engine, is_root, wait_for};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// Sends a request with exactly these bytes. Returns status and body of the response.
async fn send(daemon: &TestDaemon, head: &str, body: &[u8]) -> (u16, Value) {
    let mut stream =
        bhatti_host::socket::connect_in(daemon.data_dir(), "bhatti.sock").await.unwrap();
    let head = format!(
        "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // If the daemon refuses the body, it may close the connection before the whole body is sent.
    drop(stream.write_all(body).await);
    let mut answer = Vec::new();
    drop(timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await.unwrap());
    let text = String::from_utf8(answer).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

fn refusal(error: ClientError) -> (ErrorCode, String) {
    match error {
        ClientError::Refused(body) => (body.code, body.error),
        other => panic!("not a refusal: {other}"),
    }
}

#[tokio::test]
async fn bad_requests_get_client_error_statuses_and_codes() {
    let daemon = TestDaemon::start().await;
    let large = vec![b' '; 5 << 20];
    // Longer than a create request may be, which may carry 16 MiB of files.
    let with_files = vec![b' '; 24 << 20];
    let cases: &[(&str, &[u8], u16, &str)] = &[
        ("POST /sandboxes", b"{", 400, "bad_request"),
        ("POST /sandboxes", b"[]", 400, "bad_request"),
        ("POST /sandboxes", br#"{"colour":"red"}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"cpus":0}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"cpus":10000}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"cpus":1.5}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"cpus":-1}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"memory_mb":3}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"memory_mb":10485760}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"name":"a/b"}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"name":""}"#, 400, "bad_request"),
        ("POST /sandboxes", br#"{"env":{"A=B":"c"}}"#, 400, "bad_request"),
        ("POST /templates", &large, 413, "body_too_large"),
        ("POST /sandboxes", &with_files, 413, "body_too_large"),
        ("GET /sandboxes/nobody", b"", 404, "not_found"),
        ("DELETE /sandboxes/nobody", b"", 404, "not_found"),
        ("POST /sandboxes/nobody/exec", br#"{"cmd":["true"]}"#, 404, "not_found"),
        ("GET /sandboxes/nobody/exec/ws", b"", 404, "not_found"),
        ("GET /nothing", b"", 404, "not_found"),
        ("PUT /sandboxes", b"", 405, "method_not_allowed"),
    ];

    for (head, body, status, code) in cases {
        let (answered, error) = send(&daemon, head, body).await;
        assert_eq!((answered, &error["code"]), (*status, &json!(code)), "{head}: {error}");
        assert!(error["error"].is_string() && error["request_id"].is_string(), "{head}: {error}");
    }
    let name_of_64 = json!({ "name": "x".repeat(64) }).to_string();
    assert_eq!(send(&daemon, "POST /sandboxes", name_of_64.as_bytes()).await.0, 400);
    assert!(daemon.client.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn health_reports_engine_and_accelerator() {
    let daemon = TestDaemon::start().await;

    let health = daemon.client.health().await.unwrap();

    assert_eq!((&*health.status, &*health.engine, health.sandboxes), ("ok", "qemu", 0));
    assert!(["kvm", "tcg"].contains(&&*health.accelerator), "{}", health.accelerator);
}

#[tokio::test]
async fn without_images_the_error_names_the_command_to_run() {
    let daemon = TestDaemon::start_with(Serve { images: None, ..Serve::default() }).await;

    let error = daemon.client.create(&CreateSandbox::default()).await.unwrap_err();

    let ClientError::Refused(body) = error else { panic!("{error}") };
    assert_eq!(
        (body.code, body.hint.as_deref()),
        (ErrorCode::NotSetUp, Some("run `bhatti setup`"))
    );
    assert!(daemon.client.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn missing_qemu_is_an_error_and_leaves_nothing() {
    let config = "qemu: /no/such/qemu-system-x86_64\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;

    let (code, message) =
        refusal(daemon.client.create(&CreateSandbox::default()).await.unwrap_err());

    assert_eq!(code, ErrorCode::NotSetUp);
    assert!(message.ends_with("`/no/such/qemu-system-x86_64` is not installed"), "{message}");
    assert!(daemon.client.list().await.unwrap().is_empty());
    assert_eq!(std::fs::read_dir(daemon.data_dir().join("sandboxes")).unwrap().count(), 0);
}

#[tokio::test]
async fn second_daemon_on_a_data_directory_is_refused() {
    let daemon = TestDaemon::start().await;

    let output = daemon.cli(&["serve"]).output().await.unwrap();

    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("\nerror: another daemon runs on `"), "{stderr}");
    daemon.client.health().await.unwrap();
}

#[tokio::test]
async fn daemon_waits_for_the_lock_of_a_killed_daemon() {
    let mut daemon = TestDaemon::start().await;
    daemon.kill().await;
    // Holds the lock, as a child of the killed daemon does between fork and exec.
    let left = std::fs::File::open(daemon.data_dir().join("daemon.lock")).unwrap();
    left.lock().unwrap();
    let log = daemon.data_dir().join("serve.log");
    let let_go = async {
        let waits =
            || std::fs::read_to_string(&log).unwrap().contains("Waiting for another daemon");
        wait_for("the daemon to wait", waits).await;
        drop(left);
    };

    tokio::join!(daemon.serve(), let_go);
    daemon.client.health().await.unwrap();
}

#[tokio::test]
async fn socket_is_accessible_only_to_its_owner() {
    let daemon = TestDaemon::start().await;

    let mode = std::os::unix::fs::MetadataExt::mode(
        &std::fs::metadata(daemon.data_dir().join("bhatti.sock")).unwrap(),
    );

    assert_eq!(mode & 0o777, 0o600);
}

/// Starts a daemon that also listens on a loopback port. Returns the daemon and the port's URL.
async fn daemon_on_tcp() -> (TestDaemon, String) {
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("Listening")).expect("the daemon logs it");
    let address = line.rsplit("address=").next().unwrap().trim().to_owned();
    (daemon, format!("http://{address}"))
}

#[tokio::test]
async fn tcp_callers_need_a_key() {
    let (daemon, url) = daemon_on_tcp().await;
    let user = daemon
        .client
        .create_user(&CreateUser { name: "alice".into(), ..CreateUser::default() })
        .await
        .unwrap();

    let alice = Client::http(&url, &user.api_key).unwrap();
    assert!(alice.list().await.unwrap().is_empty());
    assert_eq!(alice.health().await.unwrap().status, "ok");

    for key in ["", "bht_0000", &user.api_key[..67], &format!("{}0", user.api_key)] {
        let nobody = Client::http(&url, key).unwrap();
        assert_eq!(refusal(nobody.list().await.unwrap_err()).0, ErrorCode::Unauthorized, "{key}");
        assert_eq!(nobody.health().await.unwrap().status, "ok");
    }
}

#[tokio::test]
async fn no_spelling_of_a_path_passes_the_auth_layer() {
    let (_daemon, url) = daemon_on_tcp().await;
    let address = url.trim_start_matches("http://");

    for path in [
        "//health/../sandboxes",
        "/health/../sandboxes",
        "/./health/../sandboxes",
        "/health/",
        "/%68ealth",
    ] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 401 "), "{path}: {answer}");
    }
}

#[tokio::test]
async fn only_the_admin_manages_users_and_names_are_unique() {
    let (daemon, url) = daemon_on_tcp().await;
    let user = daemon
        .client
        .create_user(&CreateUser { name: "alice".into(), ..CreateUser::default() })
        .await
        .unwrap();
    let alice = Client::http(&url, &user.api_key).unwrap();

    let again = daemon
        .client
        .create_user(&CreateUser { name: "alice".into(), ..CreateUser::default() })
        .await
        .unwrap_err();
    assert_eq!(refusal(again).0, ErrorCode::NameTaken);
    let forbidden = alice
        .create_user(&CreateUser { name: "bob".into(), ..CreateUser::default() })
        .await
        .unwrap_err();
    assert_eq!(refusal(forbidden).0, ErrorCode::Forbidden);
    assert_eq!(refusal(alice.list_users().await.unwrap_err()).0, ErrorCode::Forbidden);
    assert_eq!(daemon.client.list_users().await.unwrap().len(), 2);
}

#[tokio::test]
async fn user_has_limits_a_rotatable_key_and_can_be_deleted() {
    let (daemon, url) = daemon_on_tcp().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    let tcp = |key: &str| bhatti_testkit::Api::tcp(daemon.api_address(), Some(key));
    let request =
        json!({ "name": "bob", "max_sandboxes": 0, "max_cpus_per_sandbox": 2, "max_snapshots": 1 });
    let made = api.call("POST", "/users", &request).await.json();
    let bob = tcp(made["api_key"].as_str().unwrap());

    let full = bob.call("POST", "/sandboxes", &json!({})).await;
    assert_eq!(full.refusal(), (403, "quota_exceeded".to_owned()));
    for large in [json!({ "cpus": 3 }), json!({ "memory_mb": 8192 })] {
        let refused = bob.call("POST", "/sandboxes", &large).await;
        assert_eq!(refused.refusal(), (400, "bad_request".to_owned()), "{large}");
    }
    let limits = api.get("/users/bob").await.json()["limits"].clone();
    let expected = json!({ "max_sandboxes": 0, "max_cpus_per_sandbox": 2, "max_memory_mb_per_sandbox": 4096, "max_snapshots": 1, "max_volume_mb": 20480, "max_disk_mb": 51200 });
    assert_eq!(limits, expected);
    let changed = api.call("PATCH", "/users/bob", &json!({ "max_sandboxes": 7 })).await.json();
    assert_eq!(
        (&changed["limits"]["max_sandboxes"], &changed["limits"]["max_snapshots"]),
        (&json!(7), &json!(1))
    );

    let rotated = api.call("POST", "/users/bob/rotate-key", &Value::Null).await.json();
    assert_eq!(bob.get("/sandboxes").await.status, 401);
    let bob = tcp(rotated["api_key"].as_str().unwrap());
    assert_eq!(
        bob.call("POST", "/secrets", &json!({ "name": "K", "value": "v" })).await.status,
        201
    );
    let owns = api.call("DELETE", "/users/bob", &Value::Null).await;
    assert_eq!(owns.refusal(), (409, "wrong_state".to_owned()));
    assert_eq!(bob.call("DELETE", "/secrets/K", &Value::Null).await.status, 200);
    assert_eq!(api.call("DELETE", "/users/bob", &Value::Null).await.status, 200);
    assert_eq!(bob.get("/sandboxes").await.status, 401);
    for (method, path) in
        [("DELETE", "/users/admin"), ("POST", "/users/admin/rotate-key"), ("PATCH", "/users/admin")]
    {
        assert_eq!(api.call(method, path, &Value::Null).await.refusal().0, 400, "{method} {path}");
    }
    drop(url);
}

#[tokio::test]
async fn user_has_several_keys_with_scope_end_and_last_use() {
    let (daemon, _url) = daemon_on_tcp().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    let tcp = |key: &Value| bhatti_testkit::Api::tcp(daemon.api_address(), key.as_str());
    let made = api.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    let bob = tcp(&made["api_key"]);
    let create = async |request: Value| bob.call("POST", "/keys", &request).await;

    let read = create(json!({ "name": "look", "scope": "read", "expires_in_sec": 3600 })).await;
    assert_eq!(read.status, 201);
    let look = tcp(&read.json()["api_key"]);
    assert_eq!(look.get("/sandboxes").await.status, 200);
    let named = json!({ "name": "K", "value": "v" });
    for (method, path) in [
        ("POST", "/secrets"),
        ("DELETE", "/keys/default"),
        ("POST", "/ws-ticket"),
        ("POST", "/keys"),
        ("GET", "/sandboxes/dev/proxy/80/"),
    ] {
        let refused = look.call(method, path, &named).await;
        assert_eq!(refused.refusal(), (403, "forbidden".to_owned()), "{method} {path}");
    }
    let refused = look.websocket("/sandboxes/dev/exec/ws", &[]).await.err().unwrap();
    assert_eq!(refused.refusal(), (403, "forbidden".to_owned()));
    let listed = bob.get("/keys").await.json();
    let fields = |name: &str| {
        let key = listed.as_array().unwrap().iter().find(|key| key["name"] == name).unwrap();
        (key["scope"].clone(), key["expires_at"].is_string(), key["last_used_at"].is_string())
    };
    assert_eq!(fields("default"), (json!("full"), false, true));
    assert_eq!(fields("look"), (json!("read"), true, true));
    assert!(!listed.to_string().contains("bht_"), "{listed}");

    for bad in [
        json!({ "name": "look" }),
        json!({ "name": "a b" }),
        json!({ "name": "x", "scope": "all" }),
        json!({ "name": "x", "expires_in_sec": 0 }),
        json!({ "name": "x", "expires_in_sec": -1 }),
    ] {
        assert!(create(bad.clone()).await.status.is_client_error(), "{bad}");
    }
    let short = create(json!({ "name": "short", "expires_in_sec": 1 })).await.json();
    let short = tcp(&short["api_key"]);
    let gone = async {
        while short.get("/sandboxes").await.status != 401 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(10), gone).await.unwrap();

    assert_eq!(bob.call("DELETE", "/keys/look", &Value::Null).await.status, 200);
    assert_eq!(look.get("/sandboxes").await.status, 401);
    assert_eq!(bob.call("DELETE", "/keys/look", &Value::Null).await.refusal().0, 404);
    assert_eq!(bob.get("/users/bob/keys").await.refusal().0, 403);
    let made = api.call("POST", "/users/bob/keys", &json!({ "name": "admins" })).await.json();
    assert_eq!(tcp(&made["api_key"]).get("/sandboxes").await.status, 200);
    assert_eq!(api.get("/users/bob/keys").await.json().as_array().unwrap().len(), 2);
    let none = api.call("POST", "/keys", &json!({ "name": "root" })).await;
    assert_eq!(none.refusal().0, 403);
}

#[tokio::test]
async fn key_ends_with_the_key_that_created_it_and_ends_requests_in_flight() {
    let (daemon, _url) = daemon_on_tcp().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    let tcp = |key: &Value| bhatti_testkit::Api::tcp(daemon.api_address(), key.as_str());
    let made = api.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    let bob = tcp(&made["api_key"]);
    let create = async |request: Value| bob.call("POST", "/keys", &request).await;

    let made = create(json!({ "name": "hour", "expires_in_sec": 3600 })).await.json();
    let hour = tcp(&made["api_key"]);
    for request in [json!({ "name": "a" }), json!({ "name": "b", "expires_in_sec": 7200 })] {
        let child = hour.call("POST", "/keys", &request).await.json();
        assert_eq!(child["expires_at"], made["expires_at"], "{child}");
    }
    // A caller that deletes its own key gets the response.
    let deleted = hour.call("DELETE", "/keys/hour", &Value::Null).await;
    assert_eq!((deleted.status.as_u16(), &deleted.json()["status"]), (200, &json!("deleted")));
    assert_eq!(hour.get("/sandboxes").await.status, 401);
    // A request whose body is on its way when its key ends is not carried out.
    let late = create(json!({ "name": "late" })).await.json();
    let mut stream = bob.connect().await;
    let key = late["api_key"].as_str().unwrap();
    let head = format!(
        "POST /keys HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\
         Content-Type: application/json\r\nContent-Length: 17\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let used = async {
        let is_used = |key: &Value| key["name"] == "late" && key["last_used_at"].is_string();
        while !bob.get("/keys").await.json().as_array().unwrap().iter().any(is_used) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(10), used).await.unwrap();
    assert_eq!(bob.call("DELETE", "/keys/late", &Value::Null).await.status, 200);
    // The daemon may have closed the connection.
    drop(stream.write_all(br#"{"name":"stolen"}"#).await);
    let mut answer = vec![0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 401");
    assert!(!bob.get("/keys").await.text().contains("stolen"));
}

#[tokio::test]
async fn calls_of_a_client_share_a_connection() {
    let (daemon, _url) = daemon_on_tcp().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    let made = api.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    // A relay that counts connections.
    let relay = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", relay.local_addr().unwrap());
    let (connections, to) = (Arc::new(AtomicUsize::new(0)), daemon.api_address());
    let counted = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut ours, _)) = relay.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            let mut theirs = tokio::net::TcpStream::connect(to).await.unwrap();
            tokio::spawn(async move {
                drop(tokio::io::copy_bidirectional(&mut ours, &mut theirs).await);
            });
        }
    });

    let client = Client::http(&url, made["api_key"].as_str().unwrap()).unwrap();
    for _ in 0..3 {
        assert_eq!(client.list().await.unwrap(), []);
        assert!(matches!(client.inspect("none").await, Err(ClientError::Refused(_))));
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn lists_have_pages() {
    let (daemon, _url) = daemon_on_tcp().await;
    let admin = bhatti_testkit::Api::admin(&daemon);
    let made = admin.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    let bob = bhatti_testkit::Api::tcp(daemon.api_address(), made["api_key"].as_str());
    for name in ["a", "b", "c"] {
        for (path, request) in [
            ("/secrets", json!({ "name": name.to_uppercase(), "value": "v" })),
            ("/keys", json!({ "name": name })),
            ("/templates", json!({ "name": name })),
        ] {
            assert_eq!(bob.call("POST", path, &request).await.status, 201, "{path}");
        }
        assert_eq!(admin.call("POST", "/users", &json!({ "name": name })).await.status, 201);
    }
    for (api, list) in [
        (&bob, "/v1/secrets"),
        (&bob, "/keys"),
        (&bob, "/v1/templates"),
        (&admin, "/users"),
        (&admin, "/users/bob/keys"),
        (&bob, "/volumes"),
    ] {
        let whole = api.get(list).await.json();
        let (mut pages, mut next) = (Vec::new(), Some(format!("{list}?limit=1")));
        while let Some(path) = next {
            let page = api.get(&path).await;
            assert!(page.json().as_array().unwrap().len() <= 1, "{path}");
            pages.extend(page.json().as_array().unwrap().clone());
            let link = page.headers.get("link").map(|link| link.to_str().unwrap().to_owned());
            next = link.map(|link| {
                let path = link.strip_prefix('<').unwrap().strip_suffix(">; rel=\"next\"").unwrap();
                assert!(path.starts_with(list), "{path}");
                path.to_owned()
            });
        }
        assert_eq!(Value::Array(pages), whole, "{list}");
        for bad in ["limit=0", "limit=1001", "limit=x", "limit=", "size=1"] {
            let refused = api.get(&format!("{list}?{bad}")).await;
            assert_eq!(refused.refusal().0, 400, "{list}?{bad}");
        }
    }
    for list in ["/templates", "/images", "/sandboxes"] {
        assert_eq!(bob.get(&format!("{list}?after=x")).await.refusal().0, 409, "{list}");
        assert_eq!(bob.get(&format!("{list}?after=")).await.status, 200, "{list}");
    }
}

#[tokio::test]
async fn paths_may_begin_with_the_version() {
    let daemon = TestDaemon::start().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    for path in ["/v1/sandboxes", "/v1/health", "/v1/sandboxes?label=a%3Db", "/sandboxes"] {
        assert_eq!(api.get(path).await.status, 200, "{path}");
    }
    for path in ["/v1", "/v1sandboxes", "/v1/v1/sandboxes", "/v2/sandboxes", "/v1//sandboxes"] {
        assert_eq!(api.get(path).await.status, 404, "{path}");
    }
}

/// Starts a daemon with a certificate for `localhost`. Returns the certificate's file, too.
async fn daemon_with_tls(place: &Path) -> (TestDaemon, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (place.join("cert.pem"), place.join("key.pem"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let config = format!(
        "listen: 127.0.0.1:0\ntls_certificate: {}\ntls_key: {}\n",
        certificate.display(),
        key.display()
    );
    (TestDaemon::start_with(Serve { config, ..Serve::default() }).await, certificate)
}

#[tokio::test]
async fn command_line_logs_in_over_tls_and_changes_contexts() {
    let place = tempfile::tempdir().unwrap();
    let (daemon, certificate) = daemon_with_tls(place.path()).await;
    let user = CreateUser { name: "alice".into(), ..CreateUser::default() };
    let key = daemon.client.create_user(&user).await.unwrap().api_key;
    let port = daemon.api_address().port();
    let url = format!("https://localhost:{port}");
    let run = async |arguments: &[&str], input: &str, authority: &Path| {
        let mut command = bhatti_host::process::command(dist("bhatti"));
        command.args(arguments).env("HOME", place.path()).env("SSL_CERT_FILE", authority);
        command.stdin(std::process::Stdio::piped());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that reads nothing may have ended.
        drop(child.stdin.take().unwrap().write_all(input.as_bytes()).await);
        let ended = child.wait_with_output().await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (ended.status.success(), text(ended.stdout) + &text(ended.stderr))
    };

    let other = place.path().join("other.pem");
    let stranger = rcgen::generate_simple_self_signed(["x".to_owned()]).unwrap();
    std::fs::write(&other, stranger.cert.pem()).unwrap();
    let (done, said) = run(&["login", &url], &key, &other).await;
    assert!(!done && said.contains("no TLS connection to localhost"), "{said}");
    let (done, said) = run(&["login", &url], "bht_wrong", &certificate).await;
    assert!(!done && said.contains("nothing was saved"), "{said}");
    let (done, said) = run(&["login", "http://10.0.0.1:1"], &key, &certificate).await;
    assert!(!done && said.contains("plain HTTP") && said.contains("--insecure"), "{said}");
    let (done, said) = run(&["login", &url], "", &certificate).await;
    assert!(!done && said.contains("the API key is empty"), "{said}");
    assert!(!place.path().join(".bhatti").exists());

    let (done, said) = run(&["login", &url, "--name", "box"], &key, &certificate).await;
    assert!(done && said.contains("saved as `box`"), "{said}");
    let (done, said) = run(&["user", "list"], "", &certificate).await;
    assert!(!done && said.contains("only the admin"), "{said}");
    let (done, said) =
        run(&["key", "create", "ci", "--expires-in", "1d", "-q"], "", &certificate).await;
    assert!(done && said.starts_with("bht_"), "{said}");
    let (_, said) = run(&["key", "list", "-q"], "", &certificate).await;
    assert_eq!(said, "default\nci\n");
    let (_, said) = run(&["context", "list", "-q"], "", &certificate).await;
    assert_eq!(said, "local\nbox\n");
    let (done, said) = run(&["context", "use", "nowhere"], "", &certificate).await;
    assert!(!done && said.contains("there is no context `nowhere`"), "{said}");
    let data_dir = daemon.data_dir().to_str().unwrap();
    let (done, said) = run(&["user", "list", "-q", "--data-dir", data_dir], "", &certificate).await;
    assert!(done && said.contains("alice"), "{said}");
    let (_, said) = run(&["context", "use", "local"], "", &certificate).await;
    assert_eq!(said, "using local\n");
    let (done, said) = run(&["--context", "box", "list", "-q"], "", &certificate).await;
    assert!(done && said.is_empty(), "{said}");
    let (done, _) = run(&["context", "delete", "box"], "", &certificate).await;
    assert!(done);
    let (done, said) = run(&["--context", "box", "list"], "", &certificate).await;
    assert!(!done && said.contains("there is no context `box`"), "{said}");
}

#[tokio::test]
async fn unusable_certificate_is_refused_at_startup() {
    let place = tempfile::tempdir().unwrap();
    for (config, wanted) in [
        ("tls_certificate: /missing.pem\ntls_key: /missing.pem\n", "/missing.pem"),
        ("tls_key: /missing.pem\n", "config.yaml lacks `tls_certificate`"),
    ] {
        std::fs::write(place.path().join("config.yaml"), config).unwrap();
        let mut serve = bhatti_host::process::command(dist("bhatti"));
        serve.args(["serve", "--data-dir"]).arg(place.path());
        let ended = timeout(Duration::from_secs(20), serve.output()).await.unwrap().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(!ended.status.success() && said.contains(wanted), "{said}");
    }
}

#[tokio::test]
async fn rate_limited_user_gets_retry_after() {
    let (daemon, _url) = daemon_on_tcp().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    let made = api.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    let bob = bhatti_testkit::Api::tcp(daemon.api_address(), made["api_key"].as_str());

    let mut answers = Vec::new();
    for _ in 0..15 {
        answers.push(bob.send("POST", "/sandboxes", &[], "{").await);
    }

    let limited: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
    assert!((4..=5).contains(&limited.len()), "{answers:?}");
    let wait = limited[0].headers["retry-after"].to_str().unwrap();
    assert!(["1", "2"].contains(&wait), "{wait}");
    // Reads have their own rate limit, and the admin has none.
    assert_eq!(bob.get("/sandboxes").await.status, 200);
    for _ in 0..100 {
        assert_eq!(api.get("/sandboxes").await.status, 200);
    }
}

#[tokio::test]
async fn admin_reads_metrics_of_requests_and_sandboxes() {
    let (daemon, _url) = daemon_on_tcp().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    assert_eq!(api.get("/sandboxes").await.status, 200);

    let metrics = api.get("/metrics").await;

    assert!(
        metrics.headers["content-type"]
            .to_str()
            .unwrap()
            .starts_with("application/openmetrics-text")
    );
    let text = metrics.text();
    let line =
        r#"bhatti_http_request_seconds_count{method="GET",route="/sandboxes",status="200"} 1"#;
    assert!(text.contains(line), "{text}");
    assert!(text.contains(r#"bhatti_sandboxes{state="hot"} 0"#), "{text}");
}

#[tokio::test]
async fn damaged_or_missing_secret_key_is_refused_at_startup() {
    let mut daemon = TestDaemon::start().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    let secret = json!({ "name": "K", "value": "v" });
    assert_eq!(api.call("POST", "/secrets", &secret).await.status, 201);
    daemon.terminate().await;
    let key = daemon.data_dir().join("secret.key");
    let good = std::fs::read(&key).unwrap();

    for (content, complaint) in [(Some(""), "holds no key"), (None, "is missing")] {
        match content {
            Some(content) => std::fs::write(&key, content).unwrap(),
            None => std::fs::remove_file(&key).unwrap(),
        }
        let refused = daemon.cli(&["serve"]).output().await.unwrap();
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert!(stderr.contains(complaint) && !refused.status.success(), "{stderr}");
    }

    std::fs::write(&key, good).unwrap();
    daemon.serve().await;
    assert_eq!(api.get("/secrets").await.json()[0]["name"], "K");

    // `--forget-secrets` starts the daemon without the key and deletes the secrets.
    daemon.terminate().await;
    std::fs::write(&key, "damaged").unwrap();
    daemon.serve_with(|serve| serve.arguments = vec!["--forget-secrets".to_owned()]).await;
    assert_eq!(api.get("/secrets").await.json(), json!([]));
    assert_eq!(api.call("POST", "/secrets", &secret).await.status, 201);
}

/// Runs `age` or `age-keygen` with `input`, and returns its output.
async fn age(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = bhatti_host::process::command(program);
    command.args(arguments).stdin(std::process::Stdio::piped());
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert!(output.status.success(), "{program}");
    output.stdout
}

#[tokio::test]
async fn secrets_of_an_earlier_version_are_encrypted_anew() {
    let mut daemon = TestDaemon::start().await;
    let api = bhatti_testkit::Api::admin(&daemon);
    let value = "v".repeat(64 << 10);
    for name in ["A", "B"] {
        let secret = json!({ "name": name, "value": "new" });
        assert_eq!(api.call("POST", "/secrets", &secret).await.status, 201);
    }
    daemon.terminate().await;
    // Earlier versions encrypted with age. B stays as this version has encrypted it.
    let data = daemon.data_dir().to_owned();
    let identity = String::from_utf8(age("age-keygen", &[], b"").await).unwrap();
    let recipient = String::from_utf8(age("age-keygen", &["-y"], identity.as_bytes()).await);
    let encrypt = ["--encrypt", "--recipient", recipient.as_ref().unwrap().trim()];
    let store = bhatti_store::Store::open(&data).unwrap();
    let mut secrets = store.ciphertexts().unwrap();
    secrets.retain(|secret| secret.name == "A");
    secrets[0].bytes = age("age", &encrypt, value.as_bytes()).await;
    store.replace_ciphertexts(&secrets).unwrap();
    drop(store);

    let other = age("age-keygen", &[], b"").await;
    for (key, complaint) in [(Some(&other[..]), "cannot decrypt"), (None, "is missing")] {
        match key {
            Some(key) => std::fs::write(data.join("age.key"), key).unwrap(),
            None => std::fs::remove_file(data.join("age.key")).unwrap(),
        }
        let refused = daemon.cli(&["serve"]).output().await.unwrap();
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert!(stderr.contains(complaint) && !refused.status.success(), "{stderr}");
    }
    std::fs::write(data.join("age.key"), &identity).unwrap();
    daemon.serve().await;
    daemon.terminate().await;

    let store = bhatti_store::Store::open(&data).unwrap();
    let key = bhatti_secret::SecretKey::open(&data, true).unwrap();
    for secret in store.ciphertexts().unwrap() {
        let context = bhatti_control::seal_context(&secret.owner, &secret.name);
        let plain = key.unseal(&context, &secret.bytes).unwrap();
        let expected = if secret.name == "A" { &value } else { "new" };
        assert!(plain == expected.as_bytes(), "{}", secret.name);
    }
}

#[tokio::test]
async fn daemon_stops_cleanly_right_after_its_start() {
    let mut daemon = TestDaemon::start_with(Serve { images: None, ..Serve::default() }).await;
    for _ in 0..10 {
        daemon.terminate().await;
        daemon.serve().await;
    }
}

#[tokio::test]
async fn failed_deletion_does_not_stop_the_others() {
    let daemon = TestDaemon::start().await;
    for name in ["one", "two"] {
        let secret = SetSecret { name: name.to_owned(), value: "value".to_owned() };
        daemon.client.set_secret(&secret).await.unwrap();
    }

    let deleted =
        daemon.cli(&["secret", "delete", "one", "missing", "two"]).output().await.unwrap();

    assert_eq!(deleted.status.code(), Some(1));
    assert_eq!(String::from_utf8(deleted.stdout).unwrap(), "deleted one\ndeleted two\n");
    let told = String::from_utf8(deleted.stderr).unwrap();
    assert!(told.contains("missing") && told.ends_with("error: 1 of 3 failed\n"), "{told}");
    assert!(daemon.client.list_secrets().await.unwrap().is_empty());
}

/// Writes a program that runs bhatti with `system_call` failing as on a kernel that lacks it, for
/// bhatti and all its children.
fn bhatti_without(system_call: u32, place: &Path) -> PathBuf {
    let script = format!(
        r#"#!/usr/bin/env python3
import ctypes, os, struct, sys
ENOSYS, ALLOW, ERRNO = 38, 0x7FFF0000, 0x00050000
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, {system_call}), (0x06, 0, 0, ERRNO | ENOSYS), (0x06, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
program = Program(len(steps), ctypes.addressof(code))
assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)) == 0
os.execv("{bhatti}", ["bhatti", *sys.argv[1:]])
"#,
        bhatti = dist("bhatti").display()
    );
    let path = place.join("bhatti");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn root_daemon_refuses_qemu_without_landlock() {
    const LANDLOCK_CREATE_RULESET: u32 = 444;
    if engine() != "qemu" {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let program = bhatti_without(LANDLOCK_CREATE_RULESET, place.path());
    let data = tempfile::tempdir().unwrap();
    if is_root() {
        let mut serve = bhatti_host::process::command(&program);
        serve.args(["serve", "--data-dir"]).arg(data.path());

        let refused = timeout(Duration::from_secs(60), serve.output()).await.unwrap().unwrap();

        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        assert!(said.contains("this kernel has no Landlock"), "{said}");
        assert!(said.contains("`allow_without_landlock: true` in config.yaml"), "{said}");
        let mut doctor = bhatti_host::process::command(&program);
        let looked = doctor.args(["doctor", "--data-dir"]).arg(data.path()).output().await.unwrap();
        let found = String::from_utf8(looked.stdout).unwrap();
        assert!(found.contains("MISSING  landlock"), "{found}");
    }

    let config = "allow_without_landlock: true\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, program, ..Serve::default() }).await;

    assert!(
        daemon.log().contains("QEMU processes can read files of other VMs"),
        "{}",
        daemon.log()
    );
}
