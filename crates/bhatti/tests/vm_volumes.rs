//! Volumes in real guests: their content outlives the sandboxes that mount them.

use bhatti_testkit::{Api, Feature, Serve, TestDaemon, engine_has, kill_process, needs, wait_for};
use serde_json::{Value, json};

const NO_SPARES: &str = "ready_vmms: 0\n";

async fn daemon() -> (TestDaemon, Api) {
    let serve = Serve { config: NO_SPARES.into(), ..Serve::default() };
    let daemon = TestDaemon::start_with(serve).await;
    let api = Api::admin(&daemon);
    (daemon, api)
}

/// Sends a request that must succeed, and returns the response.
async fn post(api: &Api, path: &str, body: &Value) -> Value {
    let answer = api.call("POST", path, body).await;
    assert!(answer.status.is_success(), "{path}: {}", answer.text());
    answer.json()
}

async fn delete(api: &Api, path: &str) {
    let answer = api.call("DELETE", path, &Value::Null).await;
    assert!(answer.status.is_success(), "{path}: {}", answer.text());
}

async fn volume(api: &Api, name: &str) {
    post(api, "/volumes", &json!({ "name": name, "size_mb": 256 })).await;
}

fn named(name: &str, target: &str) -> Value {
    json!({ "name": name, "target": target })
}

const THREE: &str = "cat /a/own /deep/b/own /c/own | tr '\\n' ' '; stat -c '%U' /a /c | uniq; \
    findmnt -lno TARGET,OPTIONS -t ext4 | grep -v '^/ ' | awk '{print $1, substr($2, 1, 2)}' | sort | tr '\\n' ' '";

#[tokio::test]
async fn three_volumes_keep_their_content_through_every_transition() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let (mut daemon, api) = daemon().await;
    for name in ["one", "two", "three"] {
        volume(&api, name).await;
    }
    // This order is neither that of the names nor that of the creation.
    let volumes = json!([named("three", "/a"), named("one", "/deep/b"), named("two", "/c")]);
    let new = json!([{ "name": "scratch", "size_mb": 32, "mount": "/scratch" }]);
    let files = json!([{ "path": "/a/put", "content": "put" }]);
    let request = json!({ "name": "dev", "volumes": volumes, "new_volumes": new, "files": files });
    let created = post(&api, "/sandboxes", &request).await;
    let forked = engine_has(Feature::ExchangedDisks);
    let origin = if forked { "template " } else { "boot, because " };
    assert!(created["origin"].as_str().unwrap().starts_with(origin), "{created}");
    assert_eq!(created["volumes"][1]["name"], "one");
    assert_eq!(created["volumes"][3]["ephemeral"], true);
    assert_eq!(api.sh("dev", "cat /a/put; rm -f /a/put").await, "put");
    api.sh("dev", "echo 3 >/a/own; echo 1 >/deep/b/own; echo 2 >/c/own; echo s >/scratch/own")
        .await;
    let expected = "3 1 2 user\n/a rw /c rw /deep/b rw /scratch rw ";
    let user = api.sh("dev", "stat -c %U /a").await;
    let expected = expected.replace("user", user.trim());
    assert_eq!(api.sh("dev", THREE).await, expected);

    post(&api, "/sandboxes/dev/stop", &json!({})).await;
    post(&api, "/sandboxes/dev/start", &json!({})).await;
    assert_eq!(api.sh("dev", THREE).await, expected, "after a stop and a start");
    daemon.kill().await;
    daemon.serve().await;
    assert_eq!(api.sh("dev", THREE).await, expected, "with the next daemon");
    post(&api, "/sandboxes/dev/checkpoint", &json!({ "name": "saved" })).await;
    api.sh("dev", "echo later | tee /a/own /deep/b/own /c/own /scratch/own").await;

    // A sandbox resumed from the snapshot has copies of the volumes as of the snapshot.
    let again = post(&api, "/snapshots/saved/resume", &json!({ "name": "again" })).await;
    assert_eq!(api.sh("again", THREE).await, expected);
    assert_eq!(api.sh("again", "cat /scratch/own").await, "s\n");
    assert!(again["volumes"].as_array().unwrap().iter().all(|it| it["ephemeral"] == true));
    // A fork has copies of the volumes as of now. Neither sees what the other writes.
    post(&api, "/sandboxes/dev/fork", &json!({ "name": "fork" })).await;
    assert_eq!(api.sh("fork", "cat /a/own; echo fork >/a/own; sync").await, "later\n");
    assert_eq!(
        api.sh("dev", "cat /a/own; echo 3 >/a/own; echo 1 >/deep/b/own; echo 2 >/c/own").await,
        "later\n"
    );
    assert_eq!(api.sh("fork", "cat /a/own").await, "fork\n");
    post(&api, "/sandboxes/fork/stop", &json!({})).await;
    post(&api, "/sandboxes/fork/start", &json!({ "cold_boot": true })).await;
    assert_eq!(api.sh("fork", "cat /a/own /c/own").await, "fork\nlater\n");

    // The sandbox is destroyed without an explicit sync, and another one mounts its volumes.
    delete(&api, "/sandboxes/dev").await;
    let volumes = json!([named("one", "/deep/b"), named("two", "/c"), named("three", "/a")]);
    post(&api, "/sandboxes", &json!({ "name": "heir", "volumes": volumes, "cold_boot": true }))
        .await;
    let expected = expected.replace(" /scratch rw", "");
    assert_eq!(api.sh("heir", THREE).await, expected, "in the next sandbox");
    post(&api, "/sandboxes/heir/stop", &json!({})).await;
    post(&api, "/sandboxes/heir/start", &json!({ "cold_boot": true })).await;
    assert_eq!(api.sh("heir", THREE).await, expected, "after a cold boot");
}

#[tokio::test]
async fn volume_keeps_synced_files_when_its_vmm_is_killed() {
    let (daemon, api) = daemon().await;
    volume(&api, "data").await;
    let request = json!({ "name": "dev", "volumes": [named("data", "/data")] });
    post(&api, "/sandboxes", &request).await;
    let write = "cd /data; i=0; while :; do i=$((i+1)); echo $i >f$i; sync f$i; echo $i >/tmp/last; head -c 100000 /dev/urandom >noise$((i%5)); done";
    post(&api, "/sandboxes/dev/exec", &json!({ "cmd": ["sh", "-c", write], "detach": true })).await;
    let synced = async |at_least: u32| loop {
        let last = api.sh("dev", "cat /tmp/last 2>/dev/null || echo 0").await;
        let last: u32 = last.trim().parse().unwrap_or(0);
        if last >= at_least {
            return last;
        }
    };
    let last = synced(20).await;
    kill_process(daemon.vmm_pids()[0]);
    let failed = async || api.get("/sandboxes/dev").await.json()["status"] == "failed";
    while !failed().await {}

    let taken =
        api.call("POST", "/sandboxes", &json!({ "volumes": [named("data", "/data")] })).await;
    assert_eq!(taken.refusal(), (409, "wrong_state".to_owned()));
    delete(&api, "/sandboxes/dev").await;
    // The volume is attached read-only, so the guest cannot replay the journal: the daemon must
    // have done it before.
    let read = json!({ "name": "reader", "volumes": [{ "name": "data", "target": "/data", "readonly": true }] });
    post(&api, "/sandboxes", &read).await;

    let check =
        format!("for i in $(seq {last}); do [ \"$(cat /data/f$i)\" = $i ] || echo $i; done");
    assert_eq!(api.sh("reader", &check).await, "", "of {last} synced files");
    let refused = api.exec("reader", json!({ "cmd": ["sh", "-c", "echo x >/data/x"] })).await;
    assert_ne!(refused["exit_code"], 0);
    let remount = "sudo mount -o remount,rw /data && sudo touch /data/x";
    let refused = api.exec("reader", json!({ "cmd": ["sh", "-c", remount] })).await;
    assert_ne!(refused["exit_code"], 0, "root wrote to a read-only volume");
    // With Docker, this host's kernel has the volume mounted and closes it cleanly.
    let was_open = daemon.log().contains("A volume was not unmounted cleanly");
    assert_eq!(was_open, engine_has(Feature::OwnKernel), "{}", daemon.log());
}

#[tokio::test]
async fn sandbox_boots_with_its_synced_volumes_after_its_vmm_is_killed() {
    let (daemon, api) = daemon().await;
    volume(&api, "data").await;
    let own = json!([{ "name": "own", "mount": "/own", "size_mb": 32 }]);
    let volumes = json!([named("data", "/data")]);
    post(&api, "/sandboxes", &json!({ "name": "dev", "volumes": volumes, "new_volumes": own }))
        .await;
    api.sh("dev", "echo one >/data/file; echo two >/own/file; sync").await;
    kill_process(daemon.vmm_pids()[0]);
    while api.get("/sandboxes/dev").await.json()["status"] != "failed" {}

    post(&api, "/sandboxes/dev/start", &json!({ "cold_boot": true })).await;

    assert_eq!(api.sh("dev", "cat /data/file /own/file").await, "one\ntwo\n");
}

#[tokio::test]
async fn volume_keeps_its_content_when_its_paused_sandbox_is_destroyed() {
    let (_daemon, api) = daemon().await;
    volume(&api, "data").await;
    let with = |name: &str| json!({ "name": name, "volumes": [named("data", "/data")] });
    post(&api, "/sandboxes", &with("dev")).await;
    api.sh("dev", "echo written >/data/file").await;
    post(&api, "/sandboxes/dev/pause", &json!({})).await;

    delete(&api, "/sandboxes/dev").await;
    post(&api, "/sandboxes", &with("next")).await;

    assert_eq!(api.sh("next", "cat /data/file").await, "written\n");
}

#[tokio::test]
async fn volume_has_one_writer_or_many_readers_and_others_are_refused() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let (daemon, api) = daemon().await;
    volume(&api, "data").await;
    let write = |name: &str| json!({ "name": name, "volumes": [named("data", "/data")] });
    let (first, second) = (write("first"), write("second"));

    let (one, two) = tokio::join!(
        api.call("POST", "/sandboxes", &first),
        api.call("POST", "/sandboxes", &second)
    );

    let mut statuses = [one.status.as_u16(), two.status.as_u16()];
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409], "{} {}", one.text(), two.text());
    let winner = if one.status == 201 { "first" } else { "second" };
    api.sh(winner, "echo shared >/data/file").await;
    for (method, path, body) in [
        ("DELETE", "/volumes/data", Value::Null),
        ("POST", "/volumes/data/resize", json!({ "size_mb": 512 })),
        ("POST", "/volumes/data/clone", json!({ "name": "copy" })),
    ] {
        let refused = api.call(method, path, &body).await;
        assert_eq!(refused.refusal(), (409, "wrong_state".to_owned()), "{method} {path}");
    }
    assert_eq!(api.get("/volumes/data").await.json()["attached_to"][0]["sandbox"], winner);
    delete(&api, &format!("/sandboxes/{winner}")).await;

    let volumes = json!([{ "name": "data", "target": "/data", "readonly": true }]);
    for name in ["r1", "r2"] {
        post(&api, "/sandboxes", &json!({ "name": name, "volumes": volumes })).await;
        assert_eq!(api.sh(name, "cat /data/file").await, "shared\n");
    }
    let late = api.call("POST", "/sandboxes", &write("late")).await;
    assert_eq!(late.refusal().0, 409);
    post(&api, "/volumes/data/clone", &json!({ "name": "copy" })).await;
    post(&api, "/sandboxes/r1/fork", &json!({ "name": "r3" })).await;
    assert_eq!(api.sh("r3", "cat /data/file").await, "shared\n");
    // A snapshot has a copy of a read-only volume, which is read-only in resumed sandboxes, too.
    post(&api, "/sandboxes/r1/checkpoint", &json!({ "name": "reading" })).await;
    post(&api, "/snapshots/reading/resume", &json!({ "name": "r4" })).await;
    assert_eq!(
        api.sh("r4", "cat /data/file; touch /data/x 2>/dev/null || echo no").await,
        "shared\nno\n"
    );
    post(&api, "/sandboxes/r4/stop", &json!({})).await;
    post(&api, "/sandboxes/r4/start", &json!({})).await;
    assert_eq!(api.sh("r4", "cat /data/file").await, "shared\n");
    for name in ["r1", "r2", "r3", "r4"] {
        delete(&api, &format!("/sandboxes/{name}")).await;
    }

    // A volume can be grown. If it is full, only the guest's writes to it fail.
    post(&api, "/volumes/copy/resize", &json!({ "size_mb": 512 })).await;
    post(&api, "/sandboxes", &json!({ "name": "dev", "volumes": [named("copy", "/data")] })).await;
    let size = api.sh("dev", "df -m --output=size /data | tail -1").await;
    assert!(size.trim().parse::<u32>().unwrap() > 400, "{size}");
    let filled =
        api.exec("dev", json!({ "cmd": ["sh", "-c", "head -c 700M /dev/zero >/data/all"] })).await;
    assert!(filled["stderr"].as_str().unwrap().contains("No space left"), "{filled}");
    assert_eq!(
        api.sh("dev", "cat /data/file; echo well >/workspace/x; cat /workspace/x").await,
        "shared\nwell\n"
    );
    delete(&api, "/sandboxes/dev").await;
    delete(&api, "/volumes/copy").await;
    delete(&api, "/volumes/data").await;
    wait_for("removal of all volumes' files", || {
        std::fs::read_dir(daemon.data_dir().join("volumes")).unwrap().count() == 0
    })
    .await;
}

#[tokio::test]
async fn invalid_volume_is_refused_and_leaves_nothing() {
    let (daemon, api) = daemon().await;
    let refusal = async |path: &str, body: Value| api.call("POST", path, &body).await.refusal();
    let bad = (400, "bad_request".to_owned());
    let long = "x".repeat(300);
    for name in ["a/b", "../x", ".", "..", "a.b", "", "a b", &long] {
        assert_eq!(refusal("/volumes", json!({ "name": name })).await, bad, "{name}");
        let attach = json!({ "volumes": [named(name, "/data")] });
        assert_eq!(refusal("/sandboxes", attach).await, bad, "{name}");
    }
    for size in [json!(0), json!(1), json!(1u64 << 40)] {
        assert_eq!(
            refusal("/volumes", json!({ "name": "x", "size_mb": size })).await,
            bad,
            "{size}"
        );
    }
    volume(&api, "data").await;
    assert_eq!(refusal("/volumes", json!({ "name": "data" })).await.0, 409);
    assert_eq!(refusal("/volumes/data/resize", json!({ "size_mb": 32 })).await, bad);
    for target in ["data", "/", "/etc", "/usr/bin", "/data/../etc", "/proc/x"] {
        let attach = json!({ "volumes": [named("data", target)] });
        assert_eq!(refusal("/sandboxes", attach).await, bad, "{target}");
    }
    let own = |number: usize| json!({ "name": format!("v{number}"), "size_mb": 16, "mount": format!("/v{number}") });
    for request in [
        json!({ "volumes": [named("nothing", "/data")] }),
        json!({ "volumes": [named("data", "/a"), named("data", "/b")] }),
        json!({ "volumes": [named("data", "/v1")], "new_volumes": [own(1)] }),
        json!({ "new_volumes": (0..9).map(own).collect::<Vec<_>>() }),
        json!({ "volumes": [named("data", "/x/y")], "new_volumes": [{ "name": "v", "size_mb": 16, "mount": "/x" }] }),
    ] {
        assert_eq!(refusal("/sandboxes", request.clone()).await, bad, "{request}");
    }
    assert_eq!(api.get("/sandboxes").await.json(), json!([]));
    assert_eq!(api.get("/volumes").await.json().as_array().unwrap().len(), 1);

    // A sandbox may have eight volumes. A directory that the daemon does not know stays.
    let many = json!({ "name": "many", "new_volumes": (0..8).map(own).collect::<Vec<_>>() });
    post(&api, "/sandboxes", &many).await;
    assert_eq!(api.sh("many", "findmnt -lno TARGET | grep -c /v").await, "8\n");
    let stranger = daemon.data_dir().join("volumes/00000000deadbeef");
    std::fs::create_dir(&stranger).unwrap();
    let mut daemon = daemon;
    daemon.terminate().await;
    daemon.serve().await;
    assert!(stranger.exists());
    assert_eq!(api.get("/volumes").await.json()[0]["name"], "data");
}

#[tokio::test]
async fn upload_to_a_volume_survives_forks_and_pauses() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let (_daemon, api) = daemon().await;
    volume(&api, "data").await;
    post(&api, "/sandboxes", &json!({ "name": "dev", "volumes": [named("data", "/data")] })).await;
    let content = vec![b'x'; 20 << 20];
    let uploads = async {
        for number in 0..5 {
            let path = format!("/sandboxes/dev/files?path=/data/{number}");
            loop {
                let put = api.send("PUT", &path, &[], content.clone()).await;
                if put.status.is_success() {
                    break;
                }
                // An upload may fail, but never silently and never in part, so it can be repeated.
                let lost =
                    !engine_has(Feature::KeptStreams) && put.json()["code"] == "connection_lost";
                assert!(lost, "{}", put.text());
            }
        }
    };
    let pauses = async {
        for number in 0..4 {
            post(&api, "/sandboxes/dev/fork", &json!({ "name": format!("f{number}") })).await;
            // The test must resume the sandbox: an upload that was admitted before the pause waits
            // and wakes nothing.
            post(&api, "/sandboxes/dev/pause", &json!({})).await;
            post(&api, "/sandboxes/dev/resume", &json!({})).await;
            delete(&api, &format!("/sandboxes/f{number}")).await;
        }
    };

    tokio::join!(uploads, pauses);

    assert_eq!(api.sh("dev", "cat /data/[0-4] | wc -c").await, format!("{}\n", 5 * content.len()));
}

#[tokio::test]
async fn stopped_sandbox_has_a_clean_volume_and_refuses_a_changed_one() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let (mut daemon, api) = daemon().await;
    volume(&api, "data").await;
    let request = json!({ "name": "dev", "volumes": [named("data", "/data")] });
    post(&api, "/sandboxes", &request).await;
    api.sh("dev", "echo written >/data/file").await;
    post(&api, "/sandboxes/dev/stop", &json!({})).await;

    let id = api.get("/volumes/data").await.json()["id"].as_str().unwrap().to_owned();
    let file = daemon.data_dir().join(format!("volumes/{id}/volume.ext4"));
    // The journal must be empty: with `-n`, e2fsck reports a journal that needs a replay, and skips
    // the replay.
    let checked = bhatti_host::process::command("e2fsck").arg("-fn").arg(&file).output().await;
    let said = String::from_utf8_lossy(&checked.unwrap().stdout).into_owned();
    assert!(!said.contains("recovering journal") && !said.contains("skipping journal"), "{said}");

    let now = std::time::SystemTime::now();
    std::fs::File::options().write(true).open(&file).unwrap().set_modified(now).unwrap();
    let stale = api.call("POST", "/sandboxes/dev/start", &json!({})).await;
    assert_eq!(stale.refusal(), (409, "snapshot_unusable".to_owned()));
    post(&api, "/sandboxes/dev/start", &json!({ "cold_boot": true })).await;
    assert_eq!(api.sh("dev", "cat /data/file").await, "written\n");
    delete(&api, "/sandboxes/dev").await;

    // If the daemon dies while it creates a sandbox, the next daemon detaches the volume.
    daemon.terminate().await;
    daemon.serve_with(|serve| serve.fault = bhatti_testkit::fault!("daemon:running")).await;
    let create = bhatti_api::CreateSandbox {
        volumes: vec![bhatti_api::AttachVolume {
            name: "data".to_owned(),
            target: "/data".to_owned(),
            readonly: false,
        }],
        ..bhatti_testkit::named("half")
    };
    assert!(daemon.client.create(&create).await.is_err(), "the daemon answered");
    daemon.ended().await;
    daemon.serve_with(|serve| serve.fault = None).await;
    assert_eq!(api.get("/volumes/data").await.json()["attached_to"], json!([]));
    post(&api, "/sandboxes", &request).await;
    assert_eq!(api.sh("dev", "cat /data/file").await, "written\n");
}
