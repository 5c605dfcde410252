//! The API of a real daemon, as far as it needs no VM.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::time::Duration;

use bhatti_api::{CreateSandbox, CreateUser, ErrorCode};
use bhatti_client::{Client, ClientError};
use bhatti_testkit::{Serve, TestDaemon};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Sends a request as these bytes, and returns status and body of the answer.
async fn send(daemon: &TestDaemon, head: &str, body: &[u8]) -> (u16, Value) {
    let stream = bhatti_host::socket::connect_in(daemon.data_dir(), "bhatti.sock").unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = UnixStream::from_std(stream).unwrap();
    let head = format!(
        "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // A body that is refused may be cut off by the answer.
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
async fn bad_requests_get_the_status_and_code_of_the_callers_fault() {
    let daemon = TestDaemon::start().await;
    let large = vec![b' '; 5 << 20];
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
        ("POST /sandboxes", &large, 413, "body_too_large"),
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
async fn health_says_what_runs() {
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
async fn without_qemu_the_error_says_so_and_nothing_stays() {
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
    assert!(stderr.starts_with("error: another daemon runs on `"), "{stderr}");
    daemon.client.health().await.unwrap();
}

#[tokio::test]
async fn socket_is_its_owners_alone() {
    let daemon = TestDaemon::start().await;

    let mode = std::os::unix::fs::MetadataExt::mode(
        &std::fs::metadata(daemon.data_dir().join("bhatti.sock")).unwrap(),
    );

    assert_eq!(mode & 0o777, 0o600);
}

/// A daemon that also listens on a port of the loopback, and that port's URL.
async fn daemon_on_tcp() -> (TestDaemon, String) {
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("Listening")).expect("it says where");
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
async fn users_are_the_admins_business_and_their_names_unique() {
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
