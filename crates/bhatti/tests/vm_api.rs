//! The API with a real guest: creating sandboxes, commands, jobs, terminals and events.

use std::time::Duration;

use bhatti_testkit::{
    Api, Feature, LIMIT, Serve, Socket, TestDaemon, engine, engine_has, json_message, message,
    needs, replace, wait_for,
};
use futures_util::SinkExt;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn sandbox_merges_its_template_and_request() {
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let canary = "canary-5f1b";
    let secret = json!({ "name": "TOKEN", "value": canary });
    let set = api.call("POST", "/secrets", &secret).await;
    assert_eq!((set.status.as_u16(), set.json()["name"].as_str()), (201, Some("TOKEN")));
    let template = json!({
        "name": "ci", "env": { "A": "template", "B": "template" }, "secrets": ["TOKEN"], "memory_mb": 256,
        "labels": { "team": "x", "stage": "t" }, "init": "echo $TOKEN >/tmp/init",
    });
    assert_eq!(api.call("POST", "/templates", &template).await.status, 201);
    let again = api.call("POST", "/templates", &template).await;
    assert_eq!(again.refusal(), (409, "name_taken".to_owned()));

    let request = json!({
        "name": "dev", "template": "ci", "env": { "B": "request" }, "labels": { "stage": "r" }, "memory_mb": 512,
        "files": [
            { "path": "/opt/text", "content": "größe\n", "mode": "0600" },
            { "path": "/workspace/bytes", "content_base64": "AP8=" },
        ],
    });
    let created = api.call("POST", "/sandboxes", &request).await.json();
    assert_eq!(created["labels"], json!({ "team": "x", "stage": "r" }));
    assert_eq!((&created["memory_mb"], &created["secrets"]), (&json!(512), &json!(["TOKEN"])));
    assert_eq!(created["env"], json!({ "A": "template", "B": "request" }));

    assert_eq!(api.sh("dev", "echo $A $B $TOKEN").await, format!("template request {canary}\n"));
    let files = "cat /opt/text; stat -c %a /opt/text; od -An -tx1 /workspace/bytes";
    assert_eq!(api.sh("dev", files).await, "größe\n600\n 00 ff\n");
    let wait = "until [ -s /tmp/init ]; do sleep 0.05; done; cat /tmp/init";
    assert_eq!(api.sh("dev", wait).await, format!("{canary}\n"));

    // A create request whose name exists.
    let dev = json!({ "name": "dev" });
    assert_eq!(api.call("POST", "/sandboxes", &dev).await.refusal(), (409, "name_taken".into()));
    let existing = api.call("POST", "/sandboxes?if_exists=return", &dev).await;
    assert_eq!(
        (existing.status.as_u16(), &existing.headers["x-bhatti-existing"]),
        (200, &"true".parse().unwrap())
    );
    assert_eq!(existing.json()["id"], created["id"]);

    // A fork has none of the parent's secrets unless the request names them.
    let forks = [("poor", json!([]), ""), ("rich", json!(["TOKEN"]), canary)];
    for (name, secrets, token) in forks.into_iter().filter(|_| needs(Feature::SavedMemory)) {
        let request = json!({ "name": name, "secrets": secrets });
        assert_eq!(api.call("POST", "/sandboxes/dev/fork", &request).await.status, 201);
        let echo = json!({ "cmd": ["sh", "-c", "printf %s $TOKEN"] });
        let ran = api.call("POST", &format!("/sandboxes/{name}/exec"), &echo).await.json();
        assert_eq!(ran["stdout"], token, "{name}");
    }

    // The secret's value is in no response, in no log and in no file of the store.
    assert!(!api.get("/secrets").await.text().contains(canary));
    assert!(!api.get("/sandboxes/dev").await.text().contains(canary));
    assert!(!api.get("/events?limit=1000").await.text().contains(canary));
    assert!(!daemon.log().contains(canary));
    for file in ["state.db", "state.db-wal"] {
        let content = std::fs::read(daemon.data_dir().join(file)).unwrap();
        assert!(!content.windows(canary.len()).any(|part| part == canary.as_bytes()), "{file}");
    }
    assert_eq!(api.call("DELETE", "/secrets/TOKEN", &Value::Null).await.status, 200);
    let missing = json!({ "name": "x", "template": "ci" });
    let missing = api.call("POST", "/sandboxes", &missing).await;
    assert_eq!(missing.refusal(), (400, "bad_request".into()));
    assert!(missing.text().contains("TOKEN"));
}

#[tokio::test]
async fn invalid_create_requests_are_refused_and_leave_nothing() {
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let files = |path: &str| json!([{ "path": path, "content": "x" }]);
    let many: Vec<String> = (0..65).map(|number| format!("S{number}")).collect();
    for request in [
        json!({ "files": files("/tmp") }),
        json!({ "files": files("/tmp"), "cold_boot": true }),
        json!({ "files": files("/proc/x") }),
        json!({ "files": files("relative") }),
        json!({ "files": files("/a/../b") }),
        json!({ "files": [{ "path": "/x" }] }),
        json!({ "files": [{ "path": "/x", "content_base64": "?" }] }),
        json!({ "files": [{ "path": "/x", "content": "", "mode": "8" }] }),
        json!({ "secrets": ["MISSING"] }),
        json!({ "secrets": many }),
        json!({ "init": "x".repeat(70_000) }),
        json!({ "image": "no image" }),
        json!({ "timeout_sec": 0 }),
        json!({ "labels": { "bhatti.sh/x": "1" } }),
        json!({ "mounts": [] }),
    ] {
        let refused = api.call("POST", "/sandboxes", &request).await;
        assert_eq!(
            refused.refusal(),
            (400, "bad_request".to_owned()),
            "{request}: {}",
            refused.text()
        );
    }
    assert_eq!(api.call("POST", "/sandboxes", &json!({ "template": "x" })).await.status, 404);
    assert_eq!(api.get("/sandboxes").await.json(), json!([]));
    assert_eq!(daemon.sandbox_directories(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn sandbox_is_found_by_its_changed_name_and_labels() {
    let request = json!({ "name": "dev", "labels": { "a": "1", "b": "2" } });
    let (_daemon, api) = TestDaemon::with_sandbox("", &request).await;
    let change = json!({ "name": "new", "labels": { "a": null, "c": "3" } });

    let changed = api.call("PATCH", "/sandboxes/dev", &change).await.json();

    assert_eq!(
        (&changed["name"], &changed["labels"]),
        (&json!("new"), &json!({ "b": "2", "c": "3" }))
    );
    assert_eq!(api.get("/sandboxes/dev").await.status, 404);
    for (query, found) in [
        ("label=b%3D2", 1),
        ("label=b%3D2&label=c%3D3", 1),
        ("label=b%3D3", 0),
        ("label=b%3D2&label=b%3D2", 1),
    ] {
        let list = api.get(&format!("/sandboxes?{query}")).await.json();
        assert_eq!(list.as_array().unwrap().len(), found, "{query}");
    }
    for (query, status) in [
        ("label=b", 400),
        ("label=b%3D1&label=b%3D2", 400),
        ("limit=0", 400),
        ("limit=1001", 400),
        ("after=x", 409),
        ("colour=red", 400),
    ] {
        assert_eq!(api.get(&format!("/sandboxes?{query}")).await.status, status, "{query}");
    }
    let bad = json!({ "labels": { "a b": "1" } });
    assert_eq!(api.call("PATCH", "/sandboxes/new", &bad).await.refusal().0, 400);
}

#[tokio::test]
async fn expired_sandbox_is_destroyed() {
    let daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let request = json!({ "name": "dev", "timeout_sec": 2 });
    let created = api.call("POST", "/sandboxes", &request).await;
    assert!(created.json()["expires_at"].is_string(), "{}", created.text());

    let gone = async {
        while api.get("/sandboxes/dev").await.status != 404 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, gone).await.unwrap();

    wait_for("removal of the sandbox's files", || daemon.sandbox_directories().is_empty()).await;
    let events = api.get("/events?type=sandbox").await.json();
    let kinds: Vec<_> = events.as_array().unwrap().iter().map(|event| &event["type"]).collect();
    assert_eq!(kinds, ["sandbox.created", "sandbox.expired", "sandbox.destroyed"]);
}

#[tokio::test]
async fn time_limit_is_changed_and_stops_the_sandbox() {
    let (daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let state = async || api.get("/sandboxes/dev").await.json();
    let edit = async |arguments: &[&str]| {
        let all = [&["edit", "dev"], arguments].concat();
        let edited = timeout(LIMIT, daemon.cli(&all).output()).await.unwrap().unwrap();
        assert!(edited.status.success(), "{edited:?}");
        state().await
    };
    api.exec("dev", json!({ "cmd": ["sh", "-c", "echo kept >/dev/shm/memory"] })).await;

    for (arguments, has_end, on_timeout) in [
        (&["--timeout", "3600"][..], true, json!("destroy")),
        (&["--timeout", "0"], false, json!(null)),
        (&["--on-timeout", "stop"], false, json!(null)),
        (&["--timeout", "3600"], true, json!("stop")),
    ] {
        let now = edit(arguments).await;
        assert_eq!((now["expires_at"].is_string(), &now["on_timeout"]), (has_end, &on_timeout));
    }
    let bad = api.call("PATCH", "/sandboxes/dev", &json!({ "on_timeout": "pause" })).await;
    assert_eq!(bad.refusal().0, 400);
    edit(&["--timeout", "1"]).await;
    let stopped = async {
        while state().await["status"] != "stopped" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, stopped).await.unwrap();

    let limit_ends = async {
        while state().await["expires_at"].is_string() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, limit_ends).await.unwrap();
    let events = api.get("/events?type=sandbox").await.json();
    let last_two = events.as_array().unwrap().iter().rev().take(2);
    let mut kinds: Vec<_> = last_two.map(|event| event["type"].as_str().unwrap()).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["sandbox.expired", "sandbox.stopped"]);
    assert_eq!(api.call("POST", "/sandboxes/dev/start", &json!({})).await.status, 200);
    if !needs(Feature::SavedMemory) {
        return;
    }
    let kept = api.exec("dev", json!({ "cmd": ["cat", "/dev/shm/memory"] })).await;
    assert_eq!(kept["stdout"], "kept\n");
}

#[tokio::test]
async fn command_runs_as_its_user_and_ends_at_its_timeout() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;

    let root = api
        .exec(
            "dev",
            json!({ "cmd": ["id", "-u"], "user": "root", "cwd": "/", "env": { "X": "1" } }),
        )
        .await;
    assert_eq!(root["stdout"], "0\n");
    let slow = api
        .exec("dev", json!({ "cmd": ["sh", "-c", "echo begun; sleep 100"], "timeout_sec": 1 }))
        .await;
    assert_eq!((&slow["exit_code"], &slow["stdout"]), (&json!(124), &json!("begun\n")));
    let long = "AP+A".repeat(100_000);
    for bytes in ["AP+A", &long] {
        let read = api.exec("dev", json!({ "cmd": ["cat"], "stdin_base64": bytes })).await;
        assert!(read["stdout_base64"] == bytes, "{} bytes", bytes.len());
    }
    let lines = [("accept", "application/x-ndjson")];
    let body = r#"{"cmd":["sleep","100"],"timeout_sec":1}"#;
    let streamed = api.send("POST", "/sandboxes/dev/exec", &lines, body).await;
    assert_eq!(streamed.text(), "{\"type\":\"exit\",\"exit_code\":124}\n");
    for (request, code) in [
        (json!({ "cmd": ["id"], "user": "nobody-here" }), "bad_request"),
        (json!({ "cmd": ["id"], "timeout_sec": 0 }), "bad_request"),
        (json!({ "cmd": ["id"], "detach": true, "stdin": "x" }), "bad_request"),
        (json!({ "cmd": ["id"], "detach": true, "stdin_base64": "eA==" }), "bad_request"),
        (json!({ "cmd": ["cat"], "stdin": "x", "stdin_base64": "eA==" }), "bad_request"),
        (json!({ "cmd": ["cat"], "stdin_base64": "eA" }), "bad_request"),
        (json!({ "cmd": ["/no/such"], "detach": true }), "command_not_found"),
        (json!({ "cmd": ["id"], "tty": true }), "bad_request"),
    ] {
        let refused = api.call("POST", "/sandboxes/dev/exec", &request).await;
        assert_eq!(refused.refusal(), (400, code.to_owned()), "{request}");
    }
}

#[tokio::test]
async fn job_runs_without_a_client_and_keeps_the_sandbox_hot() {
    let (_daemon, api) =
        TestDaemon::with_sandbox("thermal: { warm_after_ms: 200 }\n", &json!({ "name": "dev" }))
            .await;
    let script = "echo first; until [ -e /tmp/go ]; do sleep 0.05; done; echo second; exit 3";
    let job = api.exec("dev", json!({ "cmd": ["sh", "-c", script], "detach": true })).await;
    let path = format!("/sandboxes/dev/jobs/{}", job["id"].as_str().unwrap());

    // The job runs for longer than `warm_after_ms`. If the sandbox were paused, the job would not
    // end.
    let mut events =
        api.begin("GET", &format!("{path}/output?follow=true"), &[], "").await.into_body();
    let first = timeout(LIMIT, events.frame()).await.unwrap().unwrap().unwrap();
    assert_eq!(first.into_data().unwrap(), "first\n");
    drop(events);
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(api.get("/sandboxes/dev").await.json()["thermal"], "hot");

    let followers: Vec<_> = (0..3)
        .map(|_| {
            let (api, path) = (api.clone(), format!("{path}/output?follow=true&offset=2"));
            tokio::spawn(async move { api.get(&path).await.text() })
        })
        .collect();
    let so_far = api.get(&format!("{path}/output")).await;
    assert_eq!(
        (so_far.text().as_str(), &so_far.headers["x-output-offset"]),
        ("first\n", &"0".parse().unwrap())
    );
    api.sh("dev", "touch /tmp/go").await;
    for follower in followers {
        assert_eq!(follower.await.unwrap(), "rst\nsecond\n");
    }
    let ended = async {
        while api.get(&path).await.json()["running"] == true {}
        api.get(&path).await.json()
    };
    let ended = timeout(LIMIT, ended).await.unwrap();
    assert_eq!((&ended["exit_code"], &ended["output_end"]), (&json!(3), &json!(13)));
    assert_eq!(api.call("DELETE", &path, &Value::Null).await.status, 200);
    assert_eq!(api.get(&path).await.refusal(), (404, "not_found".into()));

    let job = api.exec("dev", json!({ "cmd": ["sleep", "1000"], "detach": true })).await;
    let path = format!("/sandboxes/dev/jobs/{}", job["id"].as_str().unwrap());
    assert_eq!(api.call("DELETE", &path, &Value::Null).await.status, 200);
    let killed = async { while api.get(&path).await.json()["running"] == true {} };
    timeout(LIMIT, killed).await.unwrap();
    assert_eq!(api.get(&path).await.json()["exit_code"], 137);
}

/// Waits until a terminal has shown `wanted`, and returns everything shown until then.
async fn shows(socket: &mut Socket, wanted: &str) -> String {
    let mut shown = String::new();
    while !shown.contains(wanted) {
        match message(socket).await {
            Some(Message::Binary(bytes)) => shown.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} came after {shown:?}"),
        }
    }
    shown
}

async fn open_shell(api: &Api, query: &str) -> (Socket, Value) {
    let opened = api.websocket(&format!("/sandboxes/dev/ws{query}"), &[]).await;
    let mut socket = opened.unwrap_or_else(|answer| panic!("{}", answer.text()));
    let first = json_message(&mut socket).await;
    (socket, first)
}

#[tokio::test]
async fn terminal_is_detached_and_reattached_by_one_client_at_a_time() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let (mut socket, first) = open_shell(&api, "?rows=30&cols=100").await;
    assert_eq!(first["new"], true);
    let id = first["session_id"].as_str().unwrap().to_owned();
    socket.send(Message::text("stty size; echo $((6*7))\n")).await.unwrap();
    let shown = shows(&mut socket, "42\r\n").await;
    assert!(shown.contains("30 100"), "{shown}");
    let resize = r#"{"type":"resize","rows":40,"cols":120}"#;
    socket.send(Message::text(resize)).await.unwrap();
    socket.send(Message::binary(&b"stty size; echo re''sized\n"[..])).await.unwrap();
    assert!(shows(&mut socket, "resized\r\n").await.contains("40 120"));

    // The routes of jobs do not find a terminal session.
    for (method, of_job) in [("GET", ""), ("GET", "/output"), ("DELETE", "")] {
        let path = format!("/sandboxes/dev/jobs/{id}{of_job}");
        let answer = api.call(method, &path, &Value::Null).await;
        assert_eq!(answer.refusal(), (404, "not_found".into()), "{method} {path}");
    }

    // While this client is attached, another client that names the session is refused. One that
    // names no session gets a new one.
    let (_, refused) = open_shell(&api, &format!("?session={id}")).await;
    assert_eq!((&refused["type"], &refused["code"]), (&json!("error"), &json!("attached")));
    let (mut own, other) = open_shell(&api, "").await;
    assert_eq!(other["new"], true);
    own.send(Message::text("exit 5\n")).await.unwrap();
    let exit = loop {
        if let Message::Text(text) = message(&mut own).await.unwrap() {
            break serde_json::from_str::<Value>(&text).unwrap();
        }
    };
    assert_eq!(exit, json!({ "type": "exit", "exit_code": 5 }));

    // A detached session keeps running, and a client that reattaches sees its output.
    socket.send(Message::text("sleep 0.3; echo while''away\n")).await.unwrap();
    drop(socket);
    let detached =
        async { while api.get("/sandboxes/dev/sessions").await.json()[0]["attached"] == true {} };
    timeout(LIMIT, detached).await.unwrap();
    let (mut back, again) = open_shell(&api, "").await;
    assert_eq!(again, json!({ "type": "session", "session_id": id, "new": false }));
    shows(&mut back, "whileaway\r\n").await;

    // The daemon notices that a client disconnects even if the program reads none of its input.
    back.send(Message::text("sleep 1000\n")).await.unwrap();
    back.send(Message::text("y".repeat(900_000))).await.unwrap();
    drop(back);
    let back = async {
        loop {
            let (socket, first) = open_shell(&api, &format!("?session={id}")).await;
            if first["type"] == "session" {
                return socket;
            }
        }
    };
    let back = timeout(LIMIT, back).await.unwrap();
    let killed = api.call("DELETE", &format!("/sandboxes/dev/sessions/{id}"), &Value::Null).await;
    drop(back);
    assert_eq!(killed.status, 200);
    let (_, gone) = open_shell(&api, "?session=s99").await;
    assert_eq!(gone["code"], "not_found");
    for query in ["?rows=x", "?colour=red", "?session=a&session=b"] {
        let refused = api.websocket(&format!("/sandboxes/dev/ws{query}"), &[]).await.err().unwrap();
        assert_eq!(refused.status, 400, "{query}");
    }
}

#[tokio::test]
async fn tickets_and_keys_open_websockets_and_reach_no_log() {
    let config = "listen: 127.0.0.1:0\n";
    let daemon = TestDaemon::start_with(Serve { config: config.into(), ..Serve::default() }).await;
    let admin = Api::admin(&daemon);
    let user = admin.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    let key = user["api_key"].as_str().unwrap();
    let bob = Api::tcp(daemon.api_address(), Some(key));
    let nobody = Api::tcp(daemon.api_address(), None);
    assert_eq!(bob.call("POST", "/sandboxes", &json!({ "name": "dev" })).await.status, 201);
    let ticket = async || {
        let issued = bob.call("POST", "/ws-ticket", &Value::Null).await;
        assert_eq!(issued.status, 201);
        issued.json()["ticket"].as_str().unwrap().to_owned()
    };
    let drawn = ticket().await;

    for query in [format!("ticket={drawn}"), format!("token={key}")] {
        let path = format!("/sandboxes/dev/exec/ws?{query}");
        let mut socket =
            nobody.websocket(&path, &[]).await.unwrap_or_else(|a| panic!("{}", a.text()));
        socket.send(Message::text(r#"{"type":"start","cmd":["true"]}"#)).await.unwrap();
        assert_eq!(json_message(&mut socket).await["exit_code"], 0);
    }
    // When a user's key is rotated, WebSockets that were opened with the old key are closed.
    let path = format!("/sandboxes/dev/exec/ws?ticket={}", ticket().await);
    let mut cut = nobody.websocket(&path, &[]).await.unwrap_or_else(|a| panic!("{}", a.text()));
    cut.send(Message::text(r#"{"type":"start","cmd":["sh","-c","echo up; cat"]}"#)).await.unwrap();
    assert_eq!(message(&mut cut).await, Some(Message::binary(&b"\x02up\n"[..])));
    let unused = ticket().await;
    let rotated = admin.call("POST", "/users/bob/rotate-key", &Value::Null).await;
    assert_eq!(json_message(&mut cut).await["code"], "unauthorized");
    let refused = nobody.websocket(&format!("/sandboxes/dev/exec/ws?ticket={unused}"), &[]).await;
    assert_eq!(refused.err().unwrap().status, 401);
    let rotated = rotated.json();
    let key = rotated["api_key"].as_str().unwrap();
    let bob = Api::tcp(daemon.api_address(), Some(key));
    let ticket = async || {
        let issued = bob.call("POST", "/ws-ticket", &Value::Null).await;
        issued.json()["ticket"].as_str().unwrap().to_owned()
    };

    // A ticket is valid once. Tickets and keys in the query are valid only for WebSockets. A wrong
    // ticket or key is refused.
    let unused = ticket().await;
    for (path, wanted) in [
        (format!("/sandboxes/dev/exec/ws?ticket={drawn}"), "unauthorized"),
        ("/sandboxes/dev/exec/ws?ticket=bht-ticket_0".to_owned(), "unauthorized"),
        ("/sandboxes/dev/exec/ws?token=bht_0".to_owned(), "unauthorized"),
        ("/sandboxes/dev/exec/ws".to_owned(), "unauthorized"),
    ] {
        let refused = nobody.websocket(&path, &[]).await.err().unwrap();
        assert_eq!(refused.refusal(), (401, wanted.to_owned()), "{path}");
    }
    for query in [format!("token={key}"), format!("ticket={unused}")] {
        let refused = nobody.get(&format!("/sandboxes?{query}")).await;
        assert_eq!(refused.refusal(), (401, "unauthorized".to_owned()));
        assert_eq!(refused.headers["www-authenticate"], "Bearer");
    }
    for secret in [key, drawn.as_str(), unused.as_str()] {
        assert!(!daemon.log().contains(secret));
    }
}

#[tokio::test]
async fn request_with_an_idempotency_key_is_carried_out_once() {
    let mut daemon = TestDaemon::start().await;
    let api = Api::admin(&daemon);
    let post = async |api: &Api, path: &str, key: &str, body: Value| {
        let headers = [("idempotency-key", key), ("content-type", "application/json")];
        api.send("POST", path, &headers, body.to_string()).await
    };
    let first = post(&api, "/sandboxes", "one", json!({ "labels": { "a": "b" } })).await;
    assert_eq!((first.status.as_u16(), first.headers.get("idempotency-replayed")), (201, None));
    let id = first.json()["id"].as_str().unwrap().to_owned();
    let job =
        json!({ "cmd": ["sh", "-c", "echo ran >>/workspace/ran; sleep 1000"], "detach": true });
    let exec = format!("/sandboxes/{id}/exec");
    let started = post(&api, &exec, "job", job.clone()).await;
    assert_eq!(started.status, 202);
    // Repeated under the other name of the same path, and by the next daemon.
    daemon.kill().await;
    daemon.serve().await;
    let api = Api::admin(&daemon);
    for path in ["/sandboxes", "/v1/sandboxes"] {
        let again = post(&api, path, "one", json!({ "labels": { "a": "b" } })).await;
        assert_eq!((again.status.as_u16(), again.json()), (201, first.json()), "{path}");
        assert_eq!(again.headers["idempotency-replayed"], "true");
    }
    let again = post(&api, &exec, "job", job).await;
    assert_eq!((again.status.as_u16(), again.json()), (202, started.json()));
    assert_eq!(api.sh(&id, "cat /workspace/ran").await, "ran\n");
    assert_eq!(api.get("/sandboxes").await.json().as_array().unwrap().len(), 1);

    // A command that is no job is run each time.
    let command =
        json!({ "cmd": ["sh", "-c", "echo x >>/workspace/runs; wc -l </workspace/runs"] });
    for runs in ["1\n", "2\n"] {
        let ran = post(&api, &exec, "command", command.clone()).await;
        assert_eq!((ran.status.as_u16(), &ran.json()["stdout"]), (200, &json!(runs)));
    }

    let other = post(&api, "/sandboxes", "one", json!({ "labels": { "a": "c" } })).await;
    assert_eq!(other.refusal(), (422, "idempotency_mismatch".to_owned()));
    for key in ["", &"x".repeat(256)] {
        assert_eq!(post(&api, "/sandboxes", key, json!({})).await.status, 400, "{key}");
    }
    // A refused request uses no key up. A request whose client has left is carried out.
    let refused = post(&api, "/sandboxes", "two", json!({ "cpus": 0 })).await;
    assert_eq!(refused.status, 400);
    let mut stream = api.connect().await;
    let head = "POST /sandboxes HTTP/1.1\r\nHost: x\r\nIdempotency-Key: two\r\n\
        Content-Length: 14\r\n\r\n{\"name\":\"two\"}";
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes()).await.unwrap();
    let busy = async {
        // Until the request has arrived, its key is not in use.
        while api.get("/sandboxes/two").await.status != 200 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, busy).await.unwrap();
    drop(stream);
    let settled = async {
        loop {
            let again = post(&api, "/sandboxes", "two", json!({ "name": "two" })).await;
            if again.status != 409 {
                return again;
            }
            assert_eq!(again.refusal().1, "request_in_progress");
        }
    };
    let again = timeout(LIMIT, settled).await.unwrap();
    assert_eq!((again.status.as_u16(), &again.json()["name"]), (201, &json!("two")));
    assert_eq!(again.headers["idempotency-replayed"], "true");
}

/// Reads a response to its end. Returns what was read, and whether the response was cut off.
async fn read_all(mut response: hyper::Response<hyper::body::Incoming>) -> (Vec<u8>, bool) {
    let mut read = Vec::new();
    loop {
        match http_body_util::BodyExt::frame(response.body_mut()).await {
            Some(Ok(frame)) => {
                read.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            }
            Some(Err(_)) => return (read, true),
            None => return (read, false),
        }
    }
}

#[tokio::test]
async fn nothing_outlives_the_key_that_opened_it() {
    let config = "listen: 127.0.0.1:0\n";
    let daemon = TestDaemon::start_with(Serve { config: config.into(), ..Serve::default() }).await;
    let admin = Api::admin(&daemon);
    let user = admin.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    let bob = Api::tcp(daemon.api_address(), user["api_key"].as_str());
    assert_eq!(bob.call("POST", "/sandboxes", &json!({ "name": "dev" })).await.status, 201);
    let serve = "import http.server as h\nclass H(h.BaseHTTPRequestHandler):\n def do_GET(s):\n  \
        s.send_response(200); s.end_headers()\n  while True: s.wfile.write(b'x'*1024); s.wfile.flush(); \
        __import__('time').sleep(0.05)\nh.HTTPServer(('127.0.0.1', 8000), H).serve_forever()";
    let has_python = bob.sh("dev", "command -v python3 >/dev/null && echo yes || echo no").await;
    let job =
        json!({ "cmd": ["sh", "-c", "while :; do echo tick; sleep 0.05; done"], "detach": true });
    let job = bob.exec("dev", job).await["id"].as_str().unwrap().to_owned();
    if has_python.trim() == "yes" {
        bob.exec("dev", json!({ "cmd": ["python3", "-c", serve], "detach": true })).await;
        let answers = "curl -s -m 1 -o /dev/null http://127.0.0.1:8000/ || [ $? = 28 ]";
        bob.sh("dev", &format!("until {answers}; do sleep 0.1; done")).await;
    } else {
        bhatti_testkit::skip("a proxied stream that outlives its key", "the image has no python3");
    }
    bob.sh("dev", "dd if=/dev/zero of=/workspace/large bs=1M count=64 2>/dev/null").await;
    let key = bob.call("POST", "/keys", &json!({ "name": "ci" })).await.json();
    let ci = Api::tcp(daemon.api_address(), key["api_key"].as_str());

    let mut streams = Vec::new();
    let ndjson = [("accept", "application/x-ndjson"), ("content-type", "application/json")];
    let endless = r#"{"cmd":["sh","-c","while :; do echo tick; sleep 0.05; done"]}"#;
    streams.push(("exec", ci.begin("POST", "/sandboxes/dev/exec", &ndjson, endless).await));
    for (what, path) in [
        ("job", format!("/sandboxes/dev/jobs/{job}/output?follow=true")),
        ("events", "/events".to_owned()),
        ("watch", "/sandboxes/dev/files/watch?path=/workspace".to_owned()),
        ("file", "/sandboxes/dev/files?path=/workspace/large".to_owned()),
        ("proxy", "/sandboxes/dev/proxy/8000/".to_owned()),
    ] {
        if what != "proxy" || has_python.trim() == "yes" {
            let accept: &[_] =
                if what == "events" { &[("accept", "text/event-stream")] } else { &[] };
            let stream = ci.begin("GET", &path, accept, "").await;
            assert!(stream.status().is_success(), "{what}: {}", stream.status());
            streams.push((what, stream));
        }
    }
    // Opened before the end, used after it.
    let mut early = ci
        .websocket("/sandboxes/dev/exec/ws", &[])
        .await
        .unwrap_or_else(|a| panic!("{}", a.text()));

    assert_eq!(bob.call("DELETE", "/keys/ci", &Value::Null).await.status, 200);

    for (what, stream) in streams {
        let (read, is_cut) =
            timeout(LIMIT, read_all(stream)).await.unwrap_or_else(|_| panic!("{what}"));
        assert!(is_cut, "{what} ended as if it were complete, after {} bytes", read.len());
    }
    let start = r#"{"type":"start","cmd":["sh","-c","touch /workspace/stolen"]}"#;
    drop(early.send(Message::text(start)).await);
    let last = json_message(&mut early).await;
    assert_eq!(last["code"], "unauthorized", "{last}");
    assert_eq!(bob.sh("dev", "ls /workspace").await.trim(), "large");
}

#[tokio::test]
async fn events_are_streamed_live_and_none_is_missed() {
    let (_daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let sse = [("accept", "text/event-stream")];
    let mut live = api.begin("GET", "/events?type=sandbox", &sse, "").await.into_body();
    api.call("POST", "/sandboxes/dev/stop", &Value::Null).await;
    let next = async |live: &mut hyper::body::Incoming| {
        let mut text = String::new();
        while !text.contains("\n\n") {
            let frame = timeout(LIMIT, live.frame()).await.unwrap().unwrap().unwrap();
            text.push_str(&String::from_utf8_lossy(&frame.into_data().unwrap()));
        }
        text
    };
    let stopped = next(&mut live).await;
    assert!(stopped.contains("event: sandbox.stopped"), "{stopped}");
    let id = stopped.lines().find_map(|line| line.strip_prefix("id: ")).unwrap().to_owned();
    drop(live);

    // A client that reconnects with `Last-Event-ID` gets the events that it missed.
    api.call("POST", "/sandboxes/dev/start", &Value::Null).await;
    let headers = [sse[0], ("last-event-id", &id)];
    let mut again = api.begin("GET", "/events?type=sandbox", &headers, "").await.into_body();
    assert!(next(&mut again).await.contains("event: sandbox.started"));

    let history = api.get("/events?sandbox=dev&after=0").await.json();
    let kinds: Vec<_> =
        history.as_array().unwrap().iter().map(|event| event["type"].clone()).collect();
    let mut happened =
        vec!["sandbox.created", "sandbox.stopped", "thermal.woken", "sandbox.started"];
    // An engine that saves no memory boots the sandbox, so there is no `thermal.woken`.
    happened.retain(|kind| engine_has(Feature::SavedMemory) || *kind != "thermal.woken");
    assert_eq!(kinds, happened);
    for query in ["limit=0", "limit=1001", "after=x"] {
        assert_eq!(api.get(&format!("/events?{query}")).await.status, 400, "{query}");
    }
}

#[tokio::test]
async fn stopping_daemon_ends_its_streams_and_leaves_the_sandbox_running() {
    let (mut daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    let (mut shell, _) = open_shell(&api, "").await;
    let mut command = api
        .websocket("/sandboxes/dev/exec/ws", &[])
        .await
        .unwrap_or_else(|a| panic!("{}", a.text()));
    command
        .send(Message::text(r#"{"type":"start","cmd":["sh","-c","echo up; sleep 1000"]}"#))
        .await
        .unwrap();
    assert_eq!(message(&mut command).await, Some(Message::binary(&b"\x02up\n"[..])));
    let sse = [("accept", "text/event-stream")];
    let mut events = api.begin("GET", "/events", &sse, "").await.into_body();
    let job = api.exec("dev", json!({ "cmd": ["sleep", "1000"], "detach": true })).await;
    let follow = format!("/sandboxes/dev/jobs/{}/output?follow=true", job["id"].as_str().unwrap());
    let mut output = api.begin("GET", &follow, &[], "").await.into_body();
    api.sh("dev", "echo marker >/dev/shm/ram").await;

    // Reads all streams while the daemon stops, as clients do.
    let command = tokio::spawn(async move { json_message(&mut command).await });
    let shell = tokio::spawn(async move {
        loop {
            if let Message::Text(text) = message(&mut shell).await.unwrap() {
                return text.to_string();
            }
        }
    });
    let events = tokio::spawn(async move { while events.frame().await.is_some() {} });
    let output = tokio::spawn(async move { output.frame().await.is_none() });

    let began = tokio::time::Instant::now();
    daemon.terminate().await;

    // Streams end by themselves, sooner than the daemon cuts connections off.
    assert!(began.elapsed() < Duration::from_secs(5), "stopping took {:?}", began.elapsed());
    assert_eq!(command.await.unwrap()["code"], "connection_lost");
    assert!(shell.await.unwrap().contains("the daemon is stopping"));
    events.await.unwrap();
    assert!(output.await.unwrap());
    daemon.serve_with(|serve| serve.arguments = vec!["--log-format=json".to_owned()]).await;
    assert_eq!(api.sh("dev", "cat /dev/shm/ram").await, "marker\n");
    let log = daemon.log();
    let ready = log.lines().rev().find(|line| line.contains("Daemon ready")).unwrap();
    let ready: Value = serde_json::from_str(ready).unwrap();
    assert_eq!((&ready["level"], &ready["fields"]["engine"]), (&json!("INFO"), &json!(engine())));
    let kinds = api.get("/events?type=daemon&after=0").await.json();
    let kinds: Vec<_> =
        kinds.as_array().unwrap().iter().map(|event| event["type"].clone()).collect();
    assert_eq!(kinds, ["daemon.started", "daemon.stopped", "daemon.started"]);
}

#[tokio::test]
async fn damaged_snapshot_is_refused_with_an_event_and_the_disk_still_boots() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let (mut daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    api.sh("dev", "echo kept >/workspace/kept; sync").await;
    assert_eq!(api.call("POST", "/sandboxes/dev/stop", &Value::Null).await.status, 200);
    let snapshot = daemon.sandbox_directories()[0].join("snapshot");
    let files: Vec<_> = std::fs::read_dir(&snapshot).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(files.len() >= 3, "{files:?}");

    for file in &files {
        let whole = std::fs::read(file).unwrap();
        for part in [0, whole.len() / 2] {
            replace(file, &whole[..part]);
            daemon.kill().await;
            daemon.serve().await;
            assert_eq!(api.get("/sandboxes/dev").await.json()["status"], "stopped");
            let refused = api.call("POST", "/sandboxes/dev/start", &Value::Null).await;
            let what = format!("{} of {part} bytes", file.display());
            assert_eq!(refused.refusal(), (409, "snapshot_unusable".to_owned()), "{what}");
            let events = api.get("/events?type=snapshot.refused&sandbox=dev").await.json();
            assert!(
                events.as_array().unwrap().last().unwrap()["detail"]["error"].is_string(),
                "{what}"
            );
        }
        replace(file, whole);
    }

    replace(&files[0], "");
    let cold = json!({ "cold_boot": true });
    assert_eq!(api.call("POST", "/sandboxes/dev/start", &cold).await.status, 200);
    assert_eq!(api.sh("dev", "cat /workspace/kept").await, "kept\n");
}
