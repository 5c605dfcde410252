//! Ports of a real guest, reached through the API and through aliases. The application in the guest
//! echoes exactly what it received.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use bhatti_testkit::{
    Answer, Api, Feature, TestDaemon, engine_has, json_message, message, wait_for,
};
use futures_util::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

const UPSTREAM: &str = include_str!("guest/upstream.py");

/// Starts a daemon with a sandbox whose application listens on port 8000.
async fn with_application(config: &str) -> (TestDaemon, Api) {
    let files = json!([{ "path": "/tmp/upstream.py", "content": UPSTREAM }]);
    let request = json!({ "name": "dev", "files": files });
    let (daemon, api) = TestDaemon::with_sandbox(config, &request).await;
    let serve = json!({ "cmd": ["python3", "/tmp/upstream.py", "8000"], "detach": true });
    assert_eq!(api.call("POST", "/sandboxes/dev/exec", &serve).await.status, 202);
    let listening = async { while api.get("/sandboxes/dev/ports").await.json() == json!([]) {} };
    timeout(bhatti_testkit::LIMIT, listening).await.expect("the application listens");
    (daemon, api)
}

/// Returns a header that the application received, or null.
fn arrived(echo: &Value, name: &str) -> Value {
    let headers = echo["headers"].as_array().unwrap();
    headers.iter().find(|pair| pair[0] == name).map_or(Value::Null, |pair| pair[1].clone())
}

#[tokio::test]
async fn requests_pass_unchanged_except_for_hop_by_hop_headers() {
    let (daemon, api) = with_application("listen: 127.0.0.1:0\n").await;
    let base = "/sandboxes/dev/proxy/8000";

    // The application receives path and query as sent.
    let latin = api.get(&format!("{base}/%E9%00")).await.json();
    assert_eq!(latin["path"], "/%E9%00");
    let echo = api.get(&format!("{base}/a%2Fb//c/?q=%20&token=csrf")).await.json();
    assert_eq!(echo["path"], "/a%2Fb//c/?q=%20&token=csrf");
    assert_eq!(api.get(base).await.json()["path"], "/");
    assert_eq!(api.get(&format!("{base}/")).await.json()["path"], "/");

    // Headers and credentials.
    let headers = [
        ("connection", "x-private"),
        ("x-private", "1"),
        ("te", "trailers"),
        ("expect", "100-continue"),
        ("authorization", "Basic dTpw"),
        ("cookie", "a=b"),
    ];
    let answer = api.send("POST", &format!("{base}/x"), &headers, "hello").await;
    let echo = answer.json();
    for gone in ["x-private", "te", "expect", "transfer-encoding"] {
        assert_eq!(arrived(&echo, gone), Value::Null, "{gone}");
    }
    assert_eq!(arrived(&echo, "authorization"), "Basic dTpw");
    assert_eq!((&arrived(&echo, "cookie"), &echo["length"]), (&json!("a=b"), &json!(5)));
    assert_eq!(arrived(&echo, "host"), "localhost:8000");
    assert_eq!(arrived(&echo, "x-forwarded-host"), "daemon.test");
    assert_eq!(arrived(&echo, "x-forwarded-prefix"), base);
    for gone in ["connection", "keep-alive", "x-hop"] {
        assert!(!answer.headers.contains_key(gone), "{gone}");
    }
    assert_eq!(answer.headers["x-end"], "1");
    // The response does not share the API's origin.
    is_confined(&answer);

    // Every method passes. A response to HEAD has no body.
    for method in ["PUT", "PATCH", "DELETE", "OPTIONS"] {
        assert_eq!(api.send(method, &format!("{base}/m"), &[], "").await.json()["method"], method);
    }
    let head = api.send("HEAD", &format!("{base}/h"), &[], "").await;
    assert_eq!((head.headers["x-head"].to_str().unwrap(), head.body.len()), ("yes", 0));
    assert!(head.headers["content-length"].to_str().unwrap().parse::<u64>().unwrap() > 0);

    // A GET request with a body passes, too.
    let mut get = api.connect().await;
    let request = format!(
        "GET {base}/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    );
    get.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    get.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains(r#""length": 5"#), "{answer}");

    // Statuses, large heads, bodies in chunks.
    assert_eq!(api.get(&format!("{base}/status")).await.status, 418);
    let large = api.get(&format!("{base}/large")).await;
    assert_eq!((large.text().as_str(), large.headers["x-long"].len()), ("large", 30_000));
    assert_eq!(api.get(&format!("{base}/chunked")).await.text(), "hello");
    let body = vec![b'x'; 3 << 20];
    let echo = api.send("POST", &format!("{base}/up"), &[], body).await.json();
    assert_eq!(echo["length"], 3 << 20);

    // The daemon does not pass a network client's key or ticket to the application.
    let user = api.call("POST", "/users", &json!({ "name": "bob" })).await.json();
    let key = user["api_key"].as_str().unwrap();
    let bob = Api::tcp(daemon.api_address(), Some(key));
    assert_eq!(bob.get(base).await.refusal(), (404, "not_found".to_owned()));
    let with_key = api.send("GET", base, &[("authorization", &format!("Bearer {key}"))], "").await;
    assert_eq!(arrived(&with_key.json(), "authorization"), Value::Null);
    let path = format!("{base}/?token={key}&ticket=bht-ticket_0&z=1");
    assert_eq!(api.get(&path).await.json()["path"], "/?z=1");
}

#[tokio::test]
async fn application_failure_maps_to_its_error_code() {
    let (daemon, api) = with_application("proxy_timeout_sec: 2\n").await;
    let base = "/sandboxes/dev/proxy";
    for (path, status, code) in [
        ("/8000/silent", 504, "gateway_timeout"),
        ("/8000/close", 502, "bad_gateway"),
        ("/8000/garbage", 502, "bad_gateway"),
        ("/9999/", 502, "port_refused"),
        ("/0/", 400, "bad_request"),
        ("/65536/", 400, "bad_request"),
        ("/http/", 400, "bad_request"),
    ] {
        let answer = api.get(&format!("{base}{path}")).await;
        assert_eq!(answer.refusal(), (status, code.to_owned()), "{path}: {}", answer.text());
    }
    assert_eq!(api.get("/sandboxes/nobody/proxy/80/").await.refusal().0, 404);

    // The daemon closes the descriptors of a client that disconnects.
    let count = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let before = count();
    for _ in 0..20 {
        let mut gone = api.connect().await;
        let head = format!("GET {base}/8000/silent HTTP/1.1\r\nHost: x\r\n\r\n");
        gone.write_all(head.as_bytes()).await.unwrap();
    }
    wait_for("closed descriptors of disconnected clients", || count() <= before).await;
}

#[tokio::test]
async fn early_response_reaches_a_client_that_is_still_uploading() {
    let (daemon, api) = with_application("public_listen: 127.0.0.1:0\n").await;
    let publish = json!({ "port": 8000, "alias": "web" });
    assert_eq!(api.call("POST", "/sandboxes/dev/publish", &publish).await.status, 201);
    for (size, round) in [(300_000, 0), (300_000, 1), (2 << 20, 0), (2 << 20, 1)] {
        // This client reads only after it has sent everything.
        let mut client = tokio::net::TcpStream::connect(daemon.public_address()).await.unwrap();
        let head = format!(
            "POST /web/early HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
        );
        client.write_all(head.as_bytes()).await.unwrap();
        let sent = timeout(bhatti_testkit::LIMIT, client.write_all(&vec![0; size])).await;
        sent.expect("the daemon drains the upload").unwrap();
        let mut answer = vec![0; 12];
        let read = timeout(bhatti_testkit::LIMIT, client.read_exact(&mut answer)).await;
        read.expect("the daemon responds").unwrap();
        assert_eq!(answer, b"HTTP/1.1 413", "{size} bytes, round {round}");
    }
}

#[tokio::test]
async fn events_arrive_one_by_one() {
    let (_daemon, api) = with_application("").await;
    let base = "/sandboxes/dev/proxy/8000";

    let mut events = api.begin("GET", &format!("{base}/events"), &[], "").await.into_body();
    let mut next = async || {
        let frame = timeout(bhatti_testkit::LIMIT, events.frame()).await.unwrap();
        frame.unwrap().unwrap().into_data().unwrap()
    };

    // The application sends the second event only after `/go`, which the test requests only after
    // the first event has arrived.
    assert_eq!(next().await, "data: first\n\n");
    assert_eq!(api.get(&format!("{base}/go")).await.text(), "gone");
    assert_eq!(next().await, "data: second\n\n");
}

#[tokio::test]
async fn websockets_pass_and_keep_the_sandbox_hot() {
    let config = "thermal: { warm_after_ms: 300 }\nlisten: 127.0.0.1:0\n";
    let (daemon, api) = with_application(config).await;
    let mut socket = api.websocket("/sandboxes/dev/proxy/8000/ws?x=1", &[]).await.unwrap();

    // A message in the same packet as the response head is not lost.
    assert_eq!(message(&mut socket).await, Some(Message::text("early")));
    for text in ["hello", &"y".repeat(60_000)] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(message(&mut socket).await, Some(Message::text(text)));
    }
    // The job would keep the sandbox hot, too, so the test ends it below.
    let jobs = api.get("/sandboxes/dev/jobs").await.json();
    assert_eq!(jobs[0]["running"], true);
    drop(socket);

    // Without a client and without a job the sandbox cools; the next WebSocket wakes it.
    let serve = "setsid python3 /tmp/upstream.py 8001 >/dev/null 2>&1 &";
    let exec = json!({ "cmd": ["sh", "-c", serve] });
    assert_eq!(api.call("POST", "/sandboxes/dev/exec", &exec).await.status, 200);
    let listening = async {
        while api.get("/sandboxes/dev/ports").await.json().as_array().unwrap().len() < 2 {}
    };
    timeout(bhatti_testkit::LIMIT, listening).await.expect("the second application listens");
    let job = format!("/sandboxes/dev/jobs/{}", jobs[0]["id"].as_str().unwrap());
    assert_eq!(api.call("DELETE", &job, &Value::Null).await.status, 200);
    let warm = async {
        while api.get("/sandboxes/dev").await.json()["thermal"] == "hot" {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    timeout(bhatti_testkit::LIMIT, warm).await.expect("the sandbox cools");
    let mut socket = api.websocket("/sandboxes/dev/proxy/8001/ws", &[]).await.unwrap();
    assert_eq!(message(&mut socket).await, Some(Message::text("early")));
    assert_eq!(api.get("/sandboxes/dev").await.json()["thermal"], "hot");
    drop(daemon);
}

/// Checks that the headers give the page an origin of its own.
fn is_confined(answer: &Answer) {
    let policy = answer.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("sandbox ") && !policy.contains("allow-same-origin"), "{policy}");
}

/// Checks that the application sees requests from its own pages as same-origin, and that its
/// redirects and cookies point back to its public address.
async fn application_is_at_its_own_address(public: &Api, port: u16) {
    let own = format!("http://web.sb.test:{port}");
    let headers = [("host", &own["http://".len()..]), ("origin", own.as_str())];
    let echo = public.send("POST", "/a", &headers, "").await.json();
    assert_eq!(
        arrived(&echo, "origin"),
        format!("http://{}", arrived(&echo, "host").as_str().unwrap())
    );
    assert_eq!(arrived(&echo, "x-forwarded-host"), Value::Null);
    for (host, path, location, cookie) in [
        ("web.sb.test", "/redirect", "/x?y", "a=b; Path=/"),
        ("127.0.0.1", "/web/redirect", "/web/x?y", "a=b; Path=/web/"),
    ] {
        let answer = public.send("GET", path, &[("host", host)], "").await;
        assert_eq!(answer.headers["location"], location);
        assert_eq!(answer.headers["set-cookie"], cookie);
    }
    assert_eq!(public.get("/web/old").await.text(), "old");
}

#[tokio::test]
async fn published_port_is_reached_only_by_its_name_and_path() {
    let config = "public_listen: 127.0.0.1:0\npublic_zone: sb.test\n";
    let (daemon, api) = with_application(config).await;
    let public = Api::tcp(daemon.public_address(), None);
    let publish = json!({ "port": 8000, "alias": "web" });
    let published = api.call("POST", "/sandboxes/dev/publish", &publish).await;
    assert_eq!(published.status, 201);
    let port = daemon.public_address().port();
    let urls = [
        format!("http://web.sb.test:{port}/"),
        format!("http://web.localhost:{port}/"),
        format!("http://127.0.0.1:{port}/web/"),
    ];
    assert_eq!(published.json()["urls"], json!(urls));
    // Publishing again with the same alias changes nothing. Another alias for the port, or another
    // port for the alias, is refused.
    assert_eq!(api.call("POST", "/sandboxes/dev/publish", &publish).await.json(), published.json());
    for taken in
        [json!({ "port": 8000, "alias": "other" }), json!({ "port": 8001, "alias": "web" })]
    {
        let answer = api.call("POST", "/sandboxes/dev/publish", &taken).await;
        assert_eq!(answer.refusal(), (409, "name_taken".to_owned()));
    }
    for bad in
        [json!({ "port": 0 }), json!({ "port": 1, "alias": "A_b" }), json!({ "port": 70000 })]
    {
        assert_eq!(
            api.call("POST", "/sandboxes/dev/publish", &bad).await.refusal().0,
            400,
            "{bad}"
        );
    }

    let answer = public.get("/web/a/b?c").await;
    // Applications that are reached by path share a host name, so each gets an origin of its own.
    is_confined(&answer);
    let by_path = answer.json();
    assert_eq!(
        (&by_path["path"], arrived(&by_path, "x-forwarded-prefix")),
        (&json!("/a/b?c"), json!("/web"))
    );
    let redirect = public.get("/web?c").await;
    assert_eq!(
        (redirect.status.as_u16(), redirect.headers["location"].to_str().unwrap()),
        (308, "/web/?c")
    );
    for host in ["web.sb.test", "web.localhost:80"] {
        let headers =
            [("host", host), ("authorization", "Bearer bht_x"), ("x-forwarded-for", "1.2.3.4")];
        let by_name = public.send("GET", "/a", &headers, "").await;
        assert!(!by_name.headers.contains_key("content-security-policy"));
        let by_name = by_name.json();
        assert_eq!(by_name["path"], "/a");
        assert_eq!(arrived(&by_name, "authorization"), Value::Null);
        assert_eq!(arrived(&by_name, "x-forwarded-host"), host);
        assert_eq!(arrived(&by_name, "x-forwarded-for"), "1.2.3.4, 127.0.0.1");
    }
    application_is_at_its_own_address(&public, port).await;
    let mut socket = public.websocket("/web/ws", &[]).await.unwrap();
    assert_eq!(message(&mut socket).await, Some(Message::text("early")));
    drop(socket);
    for nothing in ["/", "/other/", "/sandboxes", "/health", "/..%2fweb/", "/WEB/"] {
        assert_eq!(public.get(nothing).await.refusal(), (404, "not_found".to_owned()), "{nothing}");
    }

    // A request wakes a paused sandbox. For a stopped sandbox, the response says only that the
    // application cannot be reached.
    assert_eq!(
        api.call("POST", "/sandboxes/dev/pause", &Value::Null).await.json()["thermal"],
        "warm"
    );
    assert_eq!(public.get("/web/woken").await.json()["path"], "/woken");
    assert_eq!(api.call("POST", "/sandboxes/dev/stop", &Value::Null).await.status, 200);
    let stopped = public.get("/web/").await;
    assert_eq!(stopped.refusal(), (502, "bad_gateway".to_owned()));
    assert!(!stopped.text().contains("dev"), "{}", stopped.text());
    assert_eq!(api.call("POST", "/sandboxes/dev/start", &Value::Null).await.status, 200);
    if engine_has(Feature::SavedMemory) {
        assert_eq!(public.get("/web/again").await.json()["path"], "/again");
    }

    assert_eq!(api.call("DELETE", "/sandboxes/dev/publish/8000", &Value::Null).await.status, 200);
    assert_eq!(api.call("DELETE", "/sandboxes/dev/publish/8000", &Value::Null).await.status, 404);
    assert_eq!(public.get("/web/").await.status, 404);
    let auto = api.call("POST", "/sandboxes/dev/publish", &json!({ "port": 8000 })).await.json();
    let alias = auto["alias"].as_str().unwrap().to_owned();
    assert!(alias.starts_with("dev-") && alias.len() == 10, "{alias}");
    assert_eq!(api.call("DELETE", "/sandboxes/dev", &Value::Null).await.status, 200);
    assert_eq!(public.get(&format!("/{alias}/")).await.status, 404);
}

#[tokio::test]
async fn thousand_idle_websockets_take_little_memory() {
    let (daemon, api) = with_application("").await;
    let mut sockets = Vec::new();
    for number in 0..1000 {
        let socket = api.websocket("/sandboxes/dev/proxy/8000/ws", &[]).await;
        let mut socket = socket.unwrap_or_else(|answer| panic!("{number}: {}", answer.text()));
        assert_eq!(message(&mut socket).await, Some(Message::text("early")));
        sockets.push(socket);
    }
    let (first, last) = (0, sockets.len() - 1);
    for index in [first, last / 2, last] {
        sockets[index].send(Message::text("still here")).await.unwrap();
        assert_eq!(message(&mut sockets[index]).await, Some(Message::text("still here")));
    }
    let exec = json!({ "cmd": ["true"] });
    assert_eq!(api.call("POST", "/sandboxes/dev/exec", &exec).await.json()["exit_code"], 0);
    let rss = bhatti_testkit::resident_mib(daemon.pid());
    assert!(rss < 150, "the daemon takes {rss} MiB");

    sockets.clear();
    let count = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    wait_for("closed descriptors", || count() < 50).await;
}

#[tokio::test]
async fn command_and_shell_websockets_refuse_other_origins() {
    let (daemon, api) = with_application("").await;
    for path in ["/sandboxes/dev/ws?new=true", "/sandboxes/dev/exec/ws"] {
        for origin in ["http://evil.test", "null", "http://daemon.test.evil.test"] {
            let refused = api.websocket(path, &[("origin", origin)]).await.err().unwrap();
            assert_eq!(refused.refusal(), (403, "forbidden".to_owned()), "{path} {origin}");
        }
        let mut own = api.websocket(path, &[("origin", "http://daemon.test")]).await.unwrap();
        if path.contains("exec") {
            own.send(Message::text(r#"{"type":"start","cmd":["true"]}"#)).await.unwrap();
            assert_eq!(json_message(&mut own).await, json!({ "type": "exit", "exit_code": 0 }));
        } else {
            assert_eq!(json_message(&mut own).await["type"], "session");
        }
        drop(own.close(None).await);
        while own.next().await.is_some() {}
    }
    drop(daemon);
}

/// A listener on port 8200 that sends nothing and reads nothing.
const LISTENER: &str = "import socket, time
server = socket.create_server(('', 8200))
kept = []
while True:
    kept.append(server.accept()[0])
";

/// Returns the daemon's count of open WebSockets.
async fn open_websockets(api: &Api) -> String {
    let metrics = api.get("/metrics").await.text();
    let line = metrics.lines().find_map(|line| line.strip_prefix("bhatti_websockets "));
    line.expect("the daemon counts open WebSockets").to_owned()
}

#[tokio::test]
async fn forwarded_connection_ends_with_its_client() {
    let files = json!([{ "path": "/tmp/listener.py", "content": LISTENER }]);
    let (_daemon, api) =
        TestDaemon::with_sandbox("", &json!({ "name": "dev", "files": files })).await;
    let serve = json!({ "cmd": ["python3", "/tmp/listener.py"], "detach": true });
    assert_eq!(api.call("POST", "/sandboxes/dev/exec", &serve).await.status, 202);
    let listening = async { while api.get("/sandboxes/dev/ports").await.json() == json!([]) {} };
    timeout(bhatti_testkit::LIMIT, listening).await.expect("the application listens");

    let silent = api.websocket("/sandboxes/dev/forward/8200", &[]).await.unwrap();
    let mut stuck = api.websocket("/sandboxes/dev/forward/8200", &[]).await.unwrap();
    // Sends until all buffers on the way to the application, which does not read, are full.
    let flood = async { while stuck.send(Message::binary(vec![0; 1 << 16])).await.is_ok() {} };
    assert!(timeout(std::time::Duration::from_secs(3), flood).await.is_err());
    assert_eq!(open_websockets(&api).await, "2");
    drop((silent, stuck));

    let ended = async { while open_websockets(&api).await != "0" {} };
    timeout(bhatti_testkit::LIMIT, ended).await.expect("the daemon ends both WebSockets");
    // The application sees the end of both connections: none is in state ESTABLISHED.
    let count = "grep -c ':2008 .* 01 ' /proc/net/tcp; true";
    let closed = async { while api.sh("dev", count).await != "0\n" {} };
    timeout(bhatti_testkit::LIMIT, closed).await.expect("the guest's connections are closed");
}

#[tokio::test]
async fn background_server_keeps_answering_after_its_command_ends() {
    let (daemon, api) = TestDaemon::with_sandbox("", &json!({ "name": "dev" })).await;
    // The server writes a line to standard error for each request.
    let start = |port: u16| format!("python3 -m http.server {port} & echo started");
    let shell = |port| json!({ "cmd": ["sh", "-c", start(port)] });

    let began = api.call("POST", "/sandboxes/dev/exec", &shell(8101)).await;
    assert_eq!(began.json()["stdout"], "started\n");
    let lines = api
        .send(
            "POST",
            "/sandboxes/dev/exec",
            &[("accept", "application/x-ndjson")],
            shell(8102).to_string(),
        )
        .await;
    assert!(lines.text().contains("started"), "{}", lines.text());
    let command = daemon.cli(&["exec", "dev", "--", "sh", "-c", &start(8103)]).output();
    assert_eq!(command.await.unwrap().stdout, b"started\n");

    for port in 8101..=8103 {
        let path = format!("/sandboxes/dev/proxy/{port}/");
        let listening = async { while api.get(&path).await.status != 200 {} };
        timeout(bhatti_testkit::LIMIT, listening).await.expect("the server listens");
        for _ in 0..10 {
            assert_eq!(api.get(&path).await.status, 200, "port {port}");
        }
    }
}
