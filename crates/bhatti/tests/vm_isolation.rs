//! Isolation between users: on every route of the API's description, the resources of one user do
//! not exist for another.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bhatti_api::StartSandbox;
use bhatti_client::{Client, Upload};
use bhatti_testkit::{
    Answer, Api, Feature, Serve, TestDaemon, dist, engine, engine_has, is_root, named, own_images,
    shell, skip,
};
use serde_json::{Map, Value, json};

/// A valid request to a route of the description.
struct Call {
    method: String,
    path: String,
    route: String,
    body: Value,
}

/// Returns a request for each route, with its path parameters filled in.
fn calls(api: &Value, names: &BTreeMap<&str, &str>) -> Vec<Call> {
    let mut calls = Vec::new();
    for (route, operations) in api["paths"].as_object().expect("paths") {
        for (method, operation) in operations.as_object().expect("operations") {
            let mut path = route.clone();
            for (parameter, name) in names {
                path = path.replace(&format!("{{{parameter}}}"), name);
            }
            assert!(!path.contains('{'), "{route} has a parameter that this test does not know");
            let required = operation["parameters"].as_array().into_iter().flatten();
            let queries: Vec<String> = required
                .filter(|parameter| parameter["in"] == "query" && parameter["required"] == true)
                .map(|parameter| {
                    format!("{}=/etc/hostname", parameter["name"].as_str().expect("a name"))
                })
                .collect();
            if !queries.is_empty() {
                path = format!("{path}?{}", queries.join("&"));
            }
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            let body = if schema.is_null() { Value::Null } else { example(api, schema) };
            calls.push(Call { method: method.to_uppercase(), path, route: route.clone(), body });
        }
    }
    calls
}

/// Returns the smallest value that a schema accepts.
fn example(api: &Value, schema: &Value) -> Value {
    if let Some(reference) = schema["$ref"].as_str() {
        return example(api, api.pointer(reference.trim_start_matches('#')).expect("a schema"));
    }
    match schema["type"].as_str() {
        Some("object") => {
            let required = schema["required"].as_array().into_iter().flatten();
            let fields = required.map(|name| {
                let name = name.as_str().expect("a name");
                (name.to_owned(), example(api, &schema["properties"][name]))
            });
            Value::Object(fields.collect::<Map<_, _>>())
        }
        Some("integer") => json!(8000),
        Some("array") => json!(["true"]),
        _ => json!("x"),
    }
}

/// Sends a request, and repeats it while it is rate limited: rate limits are not tested here.
async fn send(caller: &Api, call: &Call) -> Answer {
    loop {
        let answer = caller.call(&call.method, &call.path, &call.body).await;
        if answer.refusal().1 != "rate_limited" {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Writes a program that drops root's capabilities to switch users, as containers do, and runs
/// bhatti.
fn bhatti_without_users(place: &Path) -> PathBuf {
    let script = format!(
        "#!/bin/sh\nexec setpriv --inh-caps=-setuid,-setgid --bounding-set=-setuid,-setgid {} \"$@\"\n",
        dist("bhatti").display()
    );
    let path = place.join("bhatti");
    std::fs::write(&path, script).expect("a file can be written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
        .expect("a mode can be set");
    path
}

#[tokio::test]
async fn root_daemon_that_cannot_switch_users_runs_sandboxes_and_warns() {
    const WHAT: &str = "a root daemon that cannot switch users";
    if engine() != "qemu" {
        return;
    }
    if !is_root() {
        return skip(WHAT, "this is not root");
    }
    let place = tempfile::tempdir().expect("a directory can be made");
    let program = bhatti_without_users(place.path());
    let version = bhatti_host::process::command(&program).arg("version").output().await;
    if !version.is_ok_and(|version| version.status.success()) {
        return skip(WHAT, "this process cannot drop a capability from its bounding set");
    }
    let mut daemon = TestDaemon::start_with(Serve { program, ..Serve::default() }).await;
    daemon.client.create(&named("dev")).await.expect("a sandbox");
    shell(&daemon.client, "dev", "echo kept >/dev/shm/file").await;

    assert!(daemon.log().contains("QEMU runs as the daemon's user"), "{}", daemon.log());
    daemon.client.stop("dev").await.expect("the sandbox stops");

    // A daemon with all capabilities starts the saved sandbox.
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.program = dist("bhatti")).await;
    daemon.client.start("dev", &StartSandbox::default()).await.expect("the sandbox starts");
    assert_eq!(shell(&daemon.client, "dev", "cat /dev/shm/file").await, "kept\n");
}

/// Returns status, code and error text of a response, with `name` in the text replaced.
fn said(answer: &Answer, name: &str) -> (u16, String, String) {
    let (status, code) = answer.refusal();
    let error = answer.json()["error"].as_str().unwrap_or_default().replace(name, "NAME");
    (status, code, error)
}

/// A tar archive with one file.
fn one_file() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    tar.append_data(&mut header, "file", &b"1"[..]).expect("memory takes all bytes");
    tar.into_inner().expect("memory takes all bytes")
}

#[tokio::test]
async fn no_route_shows_the_resources_of_another_user() {
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let place = own_images().await;
    let images = Some(place.path().join("images"));
    let daemon = TestDaemon::start_with(Serve { config, images, ..Serve::default() }).await;
    let admin = Api::admin(&daemon);
    let user = async |name: &str| {
        let made = admin.call("POST", "/users", &json!({ "name": name })).await.json();
        made["api_key"].as_str().expect("a new user has a key").to_owned()
    };
    let (alice_key, bob_key) = (user("alice").await, user("bob").await);
    let [alice, bob] = [&alice_key, &bob_key].map(|key| Api::tcp(daemon.api_address(), Some(key)));
    let snapshot = engine_has(Feature::SavedMemory)
        .then(|| ("/sandboxes/hers/checkpoint", json!({ "name": "hers" })));
    for (path, body) in [
        ("/secrets", json!({ "name": "hers", "value": "v" })),
        ("/templates", json!({ "name": "hers" })),
        ("/volumes", json!({ "name": "hers", "size_mb": 16 })),
        ("/keys", json!({ "name": "hers" })),
        ("/sandboxes", json!({ "name": "hers" })),
        ("/sandboxes/hers/publish", json!({ "port": 8000 })),
    ]
    .into_iter()
    .chain(snapshot.clone())
    {
        let made = alice.call("POST", path, &body).await;
        assert_eq!(made.status, 201, "{path}: {}", made.text());
    }
    let client = Client::http(&format!("http://{}", daemon.api_address()), &alice_key);
    let archive = Upload::new(std::io::Cursor::new(one_file()), None);
    client.expect("an address").import_image("hers", archive).await.expect("an import");
    let api = admin.get("/openapi.json").await.json();
    let owned = [
        "sandbox",
        "snapshot",
        "template",
        "volume",
        "name",
        "key",
        "image",
        "operation",
        "registry",
    ];
    let names = |of: &'static str| {
        let mut names: BTreeMap<_, _> = owned.iter().map(|parameter| (*parameter, of)).collect();
        names.extend([("port", "8000"), ("job", "s1"), ("session", "s1"), ("user", "alice")]);
        names
    };
    let (hers, nobodys) = (calls(&api, &names("hers")), calls(&api, &names("nobodys")));
    let nobody = Api::tcp(daemon.api_address(), None);
    let mut seen = 0;

    for (call, control) in hers.iter().zip(&nobodys) {
        let what = format!("{} {}", call.method, call.path);
        if call.route != "/health" {
            assert_eq!(send(&nobody, call).await.status, 401, "{what}");
        }
        let answer = send(&bob, call).await;
        let is_admins = call.route.starts_with("/users");
        if !is_admins
            && owned.iter().any(|parameter| call.route.contains(&format!("{{{parameter}}}")))
        {
            assert_eq!(answer.status, 404, "{what}: {}", answer.text());
            let nothing = send(&bob, control).await;
            assert_eq!(said(&answer, "hers"), said(&nothing, "nobodys"), "{what}");
            seen += 1;
        } else if is_admins || call.route == "/metrics" {
            assert_eq!(answer.refusal(), (403, "forbidden".to_owned()), "{what}");
        } else if call.method == "GET" {
            assert!(!answer.text().contains("hers"), "{what}: {}", answer.text());
        }
    }

    assert!(seen > 30, "only {seen} routes were tried");
    let ran = alice.exec("hers", json!({ "cmd": ["echo", "well"] })).await;
    assert_eq!(ran["stdout"], "well\n");
    let snapshots = snapshot.iter().map(|_| "/snapshots");
    let others = ["/sandboxes", "/templates", "/secrets", "/sandboxes/hers/publish", "/events"];
    for list in others.into_iter().chain(snapshots) {
        let items = alice.get(list).await.json();
        assert!(!items.as_array().expect("a list").is_empty(), "{list}: {items}");
    }
}
