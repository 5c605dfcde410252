//! Every command of the command line against a real daemon with real VMs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use bhatti_testkit::{
    Feature, LIMIT, Serve, TestDaemon, engine_has, needs, own_images, registry, shell, wait_for,
};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;

/// The outcome of a command line.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Said {
    /// Checks that the command succeeded, and returns its standard output.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    #[track_caller]
    fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// Checks that the command failed with the exit code `code`, and returns its standard error.
    #[track_caller]
    fn failed(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
        self.stderr
    }
}

async fn ask(daemon: &TestDaemon, line: &str) -> Said {
    with_input(daemon, line, b"").await
}

/// Runs a command line, split at spaces, with `input` on its standard input.
async fn with_input(daemon: &TestDaemon, line: &str, input: &[u8]) -> Said {
    let arguments: Vec<&str> = line.split(' ').collect();
    run(daemon.cli(&arguments), input).await
}

async fn run(mut command: tokio::process::Command, input: &[u8]) -> Said {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let written = stdin.write_all(input).await;
    drop(stdin);
    let output = timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert!(written.is_ok() || !output.status.success());
    Said {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Returns the lines of a list after its header, split into columns.
fn rows(list: &str) -> Vec<Vec<&str>> {
    list.lines().skip(1).map(|line| line.split('\t').collect()).collect()
}

#[tokio::test]
async fn sandbox_is_addressed_by_name_or_id_and_inspected_by_id_prefix() {
    let daemon = TestDaemon::start().await;
    let id = ask(&daemon, "create -q --name dev").await.ok().trim().to_owned();
    assert_eq!(id.len(), 16);
    let prefix = &id[..6];

    for id_or_name in ["dev", &id] {
        assert_eq!(ask(&daemon, &format!("exec {id_or_name} -- echo it")).await.ok(), "it\n");
    }
    let shown = ask(&daemon, &format!("inspect {prefix} --json")).await.json();
    assert_eq!(shown["name"], "dev");
    // A name takes precedence over a prefix.
    ask(&daemon, &format!("create --name {prefix}")).await.ok();
    let shown = ask(&daemon, &format!("inspect {prefix} --json")).await.json();
    assert_ne!(shown["id"], id);
    for unknown in [&id[..5], "zz", "d"] {
        let said = ask(&daemon, &format!("inspect {unknown}")).await.failed(5);
        assert!(said.contains("not found"), "{said}");
    }
}

#[tokio::test]
async fn command_that_changes_a_sandbox_refuses_an_id_prefix() {
    let daemon = TestDaemon::start().await;
    let id = ask(&daemon, "create -q --name dev").await.ok().trim().to_owned();
    let prefix = &id[..8];

    for command in [
        format!("destroy --yes {prefix}"),
        format!("stop {prefix}"),
        format!("pause {prefix}"),
        format!("start {prefix} --cold-boot"),
        format!("edit {prefix} --name other"),
        format!("file rm {prefix} -r /workspace"),
        format!("file mkdir {prefix} /workspace/x"),
        format!("file mv {prefix} /workspace/a /workspace/b"),
        format!("kill {prefix} s1"),
        format!("fork {prefix}"),
        format!("snapshot create {prefix} saved"),
    ] {
        let said = ask(&daemon, &command).await.failed(5);
        assert!(said.contains("not found"), "{command}: {said}");
        assert!(said.contains(&format!("is a prefix of {id} (dev)")), "{command}: {said}");
    }
    ask(&daemon, &format!("exec {prefix} -- true")).await.failed(125);
    assert_eq!(ask(&daemon, "inspect dev --json").await.json()["thermal"], "hot");
}

#[tokio::test]
async fn existing_sandbox_is_returned_unchanged_if_asked_for() {
    let daemon = TestDaemon::start().await;
    let create = "create -q --name dev --memory 256 --if-exists return";
    let id = ask(&daemon, create).await.ok();
    ask(&daemon, "exec dev -- touch /workspace/kept").await.ok();

    assert_eq!(ask(&daemon, create).await.ok(), id);
    ask(&daemon, "create --name dev").await.failed(1);

    ask(&daemon, "exec dev -- cat /workspace/kept").await.ok();
}

#[tokio::test]
async fn lists_are_tables_names_or_json() {
    let daemon = TestDaemon::start().await;
    assert_eq!(ask(&daemon, "list").await.ok().lines().count(), 1);
    ask(&daemon, "create --name one --label a=b --memory 256 --env X=1").await.ok();
    ask(&daemon, "create --name two").await.ok();

    let listed = ask(&daemon, "list").await.ok();
    assert!(
        listed.starts_with("ID\tNAME\tSTATUS\tIMAGE\tCPUS\tMEMORY\tADDRESS\tCREATED\n"),
        "{listed}"
    );
    let one: Vec<_> = rows(&listed).into_iter().filter(|row| row[1] == "one").collect();
    assert_eq!((one[0][2], one[0][5]), ("running (hot)", "256 MiB"));
    assert_eq!(ask(&daemon, "list -q --label a=b").await.ok(), "one\n");
    assert_eq!(ask(&daemon, "list --json").await.json().as_array().unwrap().len(), 2);
    assert!(!listed.contains('\x1b'), "colors in a pipe");

    let edited = ask(&daemon, "edit one --name uno --label c=d --label-delete a --keep-hot").await;
    assert_eq!(edited.ok(), "uno running (hot)\n");
    let shown = ask(&daemon, "inspect uno").await.ok();
    assert!(
        shown.contains("\nlabel:      c=d\n") && shown.contains("\nkeep hot:   yes\n"),
        "{shown}"
    );
    assert!(!shown.contains("a=b"), "{shown}");
    assert!(ask(&daemon, "edit uno").await.code != Some(0));

    for (command, state) in [("pause", "warm"), ("resume", "hot"), ("stop", ""), ("start", "hot")] {
        let said = ask(&daemon, &format!("{command} two")).await.ok();
        assert!(said.starts_with("two ") && said.contains(state), "{command}: {said}");
    }
    assert_eq!(ask(&daemon, "destroy uno two").await.ok(), "destroyed uno\ndestroyed two\n");
}

#[tokio::test]
async fn jobs_are_followed_and_waited_for() {
    let daemon = TestDaemon::start().await;
    ask(&daemon, "create --name dev").await.ok();
    let script = "echo first; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo second; exit 5";
    let mut start = daemon.cli(&["exec", "-d", "-e", "A=b", "dev", "--", "sh", "-c", script]);
    let job = String::from_utf8(start.output().await.unwrap().stdout).unwrap();
    let job = job.trim();

    let mut follow = daemon.cli(&["logs", "--follow", "dev", job]);
    let mut follow = follow.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("first"));
    let waiting = daemon.cli(&["wait", "dev", job]).stdout(Stdio::piped()).spawn().unwrap();
    let listed = ask(&daemon, "ps dev").await.ok();
    assert_eq!(rows(&listed)[0][..4], [job, "job", "running", "no"]);

    ask(&daemon, "exec dev -- touch /tmp/go").await.ok();

    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("second"));
    assert_eq!(lines.next_line().await.unwrap(), None);
    let waited = timeout(LIMIT, waiting.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(
        (waited.status.code(), &*waited.stdout),
        (Some(5), format!("{job} exited 5\n").as_bytes())
    );
    assert_eq!(ask(&daemon, &format!("logs dev {job} --offset 6")).await.ok(), "second\n");
    ask(&daemon, "wait dev nope").await.failed(125);

    let endless = ask(&daemon, "exec -d dev -- sleep 1000").await.ok();
    assert_eq!(
        ask(&daemon, &format!("kill dev {}", endless.trim())).await.ok(),
        format!("killed {endless}")
    );
    let gone = ask(&daemon, &format!("wait dev {}", endless.trim())).await;
    assert!(matches!(gone.code, Some(137 | 125)), "{gone:?}");

    for line in ["exec --timeout 1 dev -- sleep 60", "exec -t --timeout 1 dev -- sleep 60"] {
        assert_eq!(ask(&daemon, line).await.code, Some(124), "{line}");
    }
    assert_eq!(ask(&daemon, "exec -u root dev -- id -un").await.ok(), "root\n");
}

#[tokio::test]
async fn shell_reads_commands_from_a_pipe_and_exec_allocates_a_terminal() {
    let daemon = TestDaemon::start().await;
    ask(&daemon, "create --name dev").await.ok();

    let said =
        with_input(&daemon, "shell -e A=b dev", b"echo $A; read x; echo got $x\nline\nexit 3\n")
            .await;
    assert_eq!((said.code, &*said.stdout), (Some(3), "b\ngot line\n"));
    let said = with_input(&daemon, "exec -it dev -- sh -c tty;cat", b"typed\n").await;
    assert_eq!(said.code, Some(0), "{said:?}");
    // The terminal's echo of the input may come before or after the output.
    assert!(said.stdout.contains("/dev/pts/") && said.stdout.ends_with("typed\r\n"), "{said:?}");
    let said = with_input(&daemon, "exec -it dev -- cat", b"half a line").await;
    assert!(said.code == Some(0) && said.stdout.contains("half a line"), "{said:?}");
    let said = run(daemon.cli(&["file", "read", "dev", "/no\x1b[31m"]), b"").await.failed(5);
    assert!(said.contains("/no\u{fffd}[31m: no such file"), "{said}");
    let said = ask(&daemon, "shell dev --attach nope").await.failed(125);
    assert!(said.contains("session `nope` not found\nhint: list them: bhatti jobs "), "{said}");
    for (line, what) in [("kill dev nope", "session"), ("logs dev nope", "job")] {
        let said = ask(&daemon, line).await.failed(5);
        let wanted = format!("{what} `nope` not found\nhint: list them: bhatti jobs ");
        assert!(said.contains(&wanted), "{said}");
    }
    ask(&daemon, "shell nobody").await.failed(125);
}

#[tokio::test]
async fn files_and_directories_are_copied_both_ways() {
    let daemon = TestDaemon::start().await;
    ask(&daemon, "create --name dev").await.ok();
    let here = tempfile::tempdir().unwrap();
    let place = |name: &str| here.path().join(name).display().to_string();
    fs::create_dir_all(place("tree/deep")).unwrap();
    fs::write(place("tree/deep/bytes"), (0..=255).collect::<Vec<u8>>().repeat(5000)).unwrap();
    fs::write(place("tree/run"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(place("tree/run"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("run", place("tree/link")).unwrap();

    ask(&daemon, &format!("file cp {} dev:/workspace", place("tree"))).await.ok();
    assert_eq!(ask(&daemon, "exec dev -- /workspace/tree/link").await.ok(), "ran\n");
    ask(&daemon, &format!("file cp dev:/workspace/tree {}", place("back"))).await.ok();
    ask(&daemon, &format!("file cp dev:/workspace/tree/deep/bytes {}", place("bytes"))).await.ok();

    for copy in ["back/deep/bytes", "bytes"] {
        assert_eq!(fs::read(place(copy)).unwrap(), fs::read(place("tree/deep/bytes")).unwrap());
    }
    assert_eq!(fs::read_link(place("back/link")).unwrap(), Path::new("run"));
    assert_eq!(fs::metadata(place("back/run")).unwrap().permissions().mode() & 0o777, 0o755);
    // If the target directory exists, the tree is copied into it under its own name.
    ask(&daemon, &format!("file cp dev:/workspace/tree {}", place("back"))).await.ok();
    assert!(Path::new(&place("back/tree/run")).exists());

    let missing = format!("file cp dev:/none {}", place("none"));
    ask(&daemon, &missing).await.failed(5);
    for (from, to) in [
        (place("none"), "dev:/x".to_owned()),
        ("dev:relative".to_owned(), place("none")),
        (place("tree"), place("none")),
        ("dev:/etc".to_owned(), "dev:/x".to_owned()),
        (place("tree"), "dev:/proc/none".to_owned()),
    ] {
        let said = ask(&daemon, &format!("file cp {from} {to}")).await;
        let code = said.code;
        said.failed(code.filter(|code| [1, 5].contains(code)).unwrap_or(1));
    }
    assert!(!Path::new(&place("none")).exists());
    let left: Vec<_> =
        fs::read_dir(here.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[tokio::test]
async fn copy_skips_sockets_and_names_unreadable_files() {
    let daemon = TestDaemon::start().await;
    ask(&daemon, "create --name dev").await.ok();
    let here = tempfile::tempdir().unwrap();
    let tree = here.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("a"), "content").unwrap();
    fs::hard_link(tree.join("a"), tree.join("b")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap());

    let up = ask(&daemon, &format!("file cp {} dev:/workspace", tree.display())).await;
    assert!(up.code == Some(0) && up.stderr.contains("skipped") && up.stderr.contains("socket"));
    let script = "cd /workspace/tree && ln b c && python3 -c 'import socket
socket.socket(socket.AF_UNIX).bind(\"guest\")'";
    run(daemon.cli(&["exec", "dev", "--", "sh", "-c", script]), b"").await.ok();
    // The first copy makes `copy`; the second goes into it, because it exists by then.
    for _ in 0..2 {
        let copy = format!("file cp dev:/workspace/tree {}", here.path().join("copy").display());
        let down = ask(&daemon, &copy).await;
        assert!(down.stderr.contains("skipped `/workspace/tree/guest`"), "{down:?}");
        down.ok();
        fs::create_dir_all(here.path().join("copy")).unwrap();
    }
    assert_eq!(fs::read(here.path().join("copy/c")).unwrap(), b"content");

    ask(&daemon, "exec -u root dev -- install -m 0600 /etc/hostname /workspace/tree/secret")
        .await
        .ok();
    let copy = format!("file cp dev:/workspace/tree {}", here.path().join("other").display());
    let said = ask(&daemon, &copy).await.failed(1);
    assert!(said.contains("/workspace/tree/secret: permission denied"), "{said}");
    assert!(!here.path().join("other").exists());
    ask(&daemon, &copy.replacen("cp", "cp --user root", 1)).await.ok();
    assert!(here.path().join("other/secret").exists());
}

#[tokio::test]
async fn files_are_read_written_listed_and_moved() {
    let daemon = TestDaemon::start().await;
    ask(&daemon, "create --name dev").await.ok();

    with_input(&daemon, "file write dev /workspace/a --mode 0600", b"text\n").await.ok();
    assert_eq!(ask(&daemon, "file read dev /workspace/a").await.ok(), "text\n");
    let listed = ask(&daemon, "file ls dev").await.ok();
    let row = &rows(&listed)[0];
    assert_eq!((row[0], row[1], row[3]), ("-0600", "5", "a"));
    let facts = ask(&daemon, "file stat dev /workspace/a --json").await.json();
    assert_eq!((&facts["size"], &facts["is_dir"]), (&Value::from(5), &Value::from(false)));
    ask(&daemon, "file mkdir dev -p /workspace/x/y").await.ok();
    ask(&daemon, "file mv dev /workspace/a /workspace/x/b").await.ok();
    assert_eq!(ask(&daemon, "file ls dev /workspace/x -q").await.ok(), "b\ny\n");
    let said = ask(&daemon, "file rm dev /workspace/x").await.failed(1);
    assert!(said.contains("not empty"), "{said}");
    ask(&daemon, "file rm dev -r /workspace/x").await.ok();
    let said = ask(&daemon, "file stat dev /workspace/x").await.failed(5);
    assert!(said.contains("no such file"), "{said}");
}

#[tokio::test]
async fn secrets_templates_and_users_are_managed() {
    let config = "listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;

    with_input(&daemon, "secret set KEY", b"s3cret\n").await.ok();
    let said = with_input(&daemon, "secret set EMPTY", b"\n").await.failed(1);
    assert!(said.contains("the value is empty"), "{said}");
    let listed = ask(&daemon, "secret list").await.ok();
    assert!(rows(&listed)[0][0] == "KEY" && !listed.contains("s3cret"), "{listed}");
    ask(&daemon, "template create web --memory 256 --env P=1 --secret KEY --label t=w").await.ok();
    assert_eq!(ask(&daemon, "template list -q").await.ok(), "web\n");
    let shown = ask(&daemon, "template inspect web").await.ok();
    assert!(shown.contains("memory:   256 MiB\n") && shown.contains("secret:   KEY\n"), "{shown}");
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "from here").unwrap();
    let created =
        format!("create --name dev --template web --file {}:/etc/here", file.path().display());
    ask(&daemon, &created).await.ok();
    let mut show = daemon.cli(&["exec", "dev", "--", "sh", "-c", "echo $P $KEY; cat /etc/here"]);
    assert_eq!(show.output().await.unwrap().stdout, b"1 s3cret\nfrom here");
    assert_eq!(ask(&daemon, "template delete web").await.ok(), "deleted web\n");
    ask(&daemon, "destroy dev").await.ok();
    ask(&daemon, "secret delete KEY").await.ok();

    let key = ask(&daemon, "user create alice --max-sandboxes 2 -q").await.ok();
    let shown = ask(&daemon, "user edit alice --max-cpus 3").await.ok();
    assert!(shown.contains("sandboxes:   2\n") && shown.contains("cpus each:   3\n"), "{shown}");
    let other = ask(&daemon, "user rotate-key alice -q").await.ok();
    let url = format!("http://{}", daemon.api_address());
    let home = tempfile::tempdir().unwrap();
    let with_home = |arguments: &[&str]| {
        let mut command = bhatti_host::process::command(bhatti_testkit::dist("bhatti"));
        command.args(arguments).env("HOME", home.path());
        command
    };
    let old = run(with_home(&["setup", "--url", &url, "--token", key.trim()]), b"").await.failed(4);
    assert!(old.contains("nothing was saved"), "{old}");
    assert!(!home.path().join(".bhatti").exists());
    run(with_home(&["setup", "--url", &url, "--token", other.trim()]), b"").await.ok();
    let saved = home.path().join(".bhatti/config.yaml");
    assert_eq!(saved.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(run(with_home(&["list", "-q"]), b"").await.ok(), "");
    // The saved key is sent only to the daemon that it was saved for.
    let said = run(with_home(&["list", "--url", "http://127.0.0.1:1"]), b"").await.failed(1);
    assert!(said.contains("there is no API key"), "{said}");
    let said = run(with_home(&["user", "list"]), b"").await.failed(4);
    assert!(said.contains("only the admin"), "{said}");
    assert_eq!(ask(&daemon, "user delete alice").await.ok(), "deleted alice\n");
    assert_eq!(ask(&daemon, "user list -q").await.ok(), "admin\n");
}

#[tokio::test]
async fn image_is_built_with_more_packages() {
    let place = own_images().await;
    let images = Some(place.path().join("images"));
    let serve = Serve { images, ..Serve::default() };
    // Builds before the daemon starts, because the daemon's network namespace has no way to the
    // package mirror.
    let build = async |name: &str, package: &str| {
        let mut command = bhatti_host::process::command(bhatti_testkit::dist("bhatti"));
        command.arg("--data-dir").arg(place.path());
        command.args(["image", "build", "-t", name, "--package", package]);
        let output = timeout(5 * LIMIT, command.output()).await.unwrap().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let (built, said) = build("no", "Not a package").await;
    assert!(!built && said.contains("Not a package"), "{said}");
    let (built, said) = build("tools", "bc").await;
    assert!(built, "{said}");
    let (built, said) = build("tools", "dc").await;
    assert!(!built && said.contains("already exists"), "{said}");

    let daemon = TestDaemon::start_with(serve).await;
    assert_eq!(ask(&daemon, "image list -q").await.ok(), "minimal\ntools\n");
    assert!(ask(&daemon, "image inspect tools").await.ok().contains("bc"));
    ask(&daemon, "create --name dev --image tools").await.ok();
    let said = with_input(&daemon, "exec dev -- bc", b"6*7\n").await;
    assert_eq!(said.ok(), "42\n");
}

#[tokio::test]
async fn snapshots_and_volumes_are_managed() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    ask(&daemon, "volume create data --size 64").await.ok();
    ask(&daemon, "volume resize data --size 96").await.ok();
    ask(&daemon, "volume clone data copy").await.ok();
    let shown = ask(&daemon, "volume inspect copy").await.ok();
    assert!(shown.contains("96 MiB"), "{shown}");
    assert_eq!(ask(&daemon, "volume list -q").await.ok(), "copy\ndata\n");
    ask(&daemon, "create --name dev --volume data:/data").await.ok();
    let said = ask(&daemon, "volume delete data").await.failed(1);
    assert!(said.contains("attached to a sandbox (dev)"), "{said}");
    assert_eq!(ask(&daemon, "volume delete copy").await.ok(), "deleted copy\n");

    ask(&daemon, "exec dev -- sh -c echo>/dev/shm/there").await.ok();
    ask(&daemon, "snapshot create dev ready").await.ok();
    let shown = ask(&daemon, "snapshot inspect ready").await.ok();
    assert!(shown.contains("dev") && shown.contains("512 MiB"), "{shown}");
    ask(&daemon, "snapshot resume ready --name again --label from=ready").await.ok();
    assert_eq!(ask(&daemon, "exec again -- ls /dev/shm").await.ok(), "there\n");
    assert_eq!(ask(&daemon, "list -q --label from=ready").await.ok(), "again\n");
    assert_eq!(ask(&daemon, "snapshot delete ready").await.ok(), "deleted ready\n");
    let said = ask(&daemon, "snapshot inspect ready").await.failed(5);
    assert!(said.contains("`ready`"), "{said}");
}

#[tokio::test]
async fn image_is_imported_used_and_deleted() {
    let place = own_images().await;
    let images = Some(place.path().join("images"));
    let serve = Serve { images, ..Serve::default() };
    let daemon = TestDaemon::start_with(serve).await;
    let tar = place.path().join("root.tar.gz");
    fs::write(&tar, registry::busybox(&[("marked", 0o644, b"")]).content()).unwrap();

    ask(&daemon, &format!("image import mine {}", tar.display())).await.ok();

    let said = ask(&daemon, &format!("image import mine {}", tar.display())).await.failed(1);
    assert!(said.contains("already exists"), "{said}");
    let said = with_input(&daemon, "image import bad -", b"no archive").await.failed(1);
    assert!(said.contains("cannot be unpacked") && said.contains("hint: "), "{said}");
    assert_eq!(ask(&daemon, "image list -q").await.ok(), "mine\nminimal\n");
    assert!(ask(&daemon, "image inspect mine").await.ok().contains("imported archive"));
    ask(&daemon, "create --name its --image mine").await.ok();
    assert_eq!(
        ask(&daemon, "exec its -- ls /marked /workspace -d").await.ok(),
        "/marked\n/workspace\n"
    );
    let said = ask(&daemon, "image delete mine").await.failed(1);
    assert!(said.contains("in use by sandbox `its`"), "{said}");
    let said = ask(&daemon, "image delete minimal").await.failed(1);
    assert!(said.contains("the default image"), "{said}");
    ask(&daemon, "destroy its").await.ok();
    assert_eq!(ask(&daemon, "image delete mine").await.ok(), "deleted mine\n");
    ask(&daemon, "create --image mine").await.failed(1);
}

#[tokio::test]
async fn image_for_development_has_its_tools() {
    let images = bhatti_testkit::repository().join("target/test-data-dev/images");
    let daemon = TestDaemon::start_with(Serve { images: Some(images), ..Serve::default() }).await;
    ask(&daemon, "create --name dev --image dev").await.ok();
    let client = &daemon.client;
    let compile =
        "cd /workspace && echo 'int main(void) { return 42; }' >a.c && make -s a && ./a; echo $?";
    assert_eq!(shell(client, "dev", compile).await, "42\n");
    let found = shell(client, "dev", "node -e 'console.log(6 * 7)'; for it in pip3 npm git less wget unzip ping ssh jq; do command -v $it; done").await;
    assert_eq!(found.lines().count(), 10, "{found}");
    shell(
        client,
        "dev",
        "python3 -m venv --without-pip /workspace/env && /workspace/env/bin/python -c 'import sys'",
    )
    .await;
    ask(&daemon, "destroy dev").await.ok();
}

#[tokio::test]
async fn image_of_one_program_boots_and_runs_it() {
    if !needs(Feature::OwnKernel) {
        return;
    }
    let place = own_images().await;
    let images = Some(place.path().join("images"));
    let serve = Serve { images, ..Serve::default() };
    let daemon = TestDaemon::start_with(serve).await;
    // The guest agent's program needs no library. Run by hand, it refuses to run.
    let tree = place.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::copy(bhatti_testkit::dist("lohar"), tree.join("app")).unwrap();
    let tar = place.path().join("app.tar");
    let packed = bhatti_host::process::command("tar")
        .arg("-cf")
        .arg(&tar)
        .arg("-C")
        .arg(&tree)
        .arg("app")
        .status();
    assert!(packed.await.unwrap().success());
    ask(&daemon, &format!("image import app {}", tar.display())).await.ok();

    ask(&daemon, "create --name one --image app").await.ok();

    let said = ask(&daemon, "exec one -- /app").await;
    assert!(said.code == Some(1) && said.stderr.contains("refusing to run"), "{said:?}");
    let said = ask(&daemon, "exec one -- sh -c true").await.failed(127);
    assert!(said.contains("not found"), "{said}");
    assert_eq!(ask(&daemon, "file read one /etc/hostname").await.ok(), "one\n");
    ask(&daemon, "destroy one").await.ok();
}

/// Program for a server in the guest that echoes its input.
const ECHO: &str = r#"
import socket, threading
server = socket.create_server(('127.0.0.1', 7000))
print('ready', flush=True)
def serve(c):
    while data := c.recv(65536):
        c.sendall(data)
    c.sendall(b'bye'); c.close()
while True:
    threading.Thread(target=serve, args=(server.accept()[0],)).start()
"#;

#[tokio::test]
async fn ports_are_listed_published_and_forwarded() {
    let config = "public_listen: 127.0.0.1:0\n".to_owned();
    let daemon = TestDaemon::start_with(Serve { config, ..Serve::default() }).await;
    ask(&daemon, "create --name dev --network none").await.ok();
    let mut echo = daemon.cli(&["exec", "dev", "--", "python3", "-c", ECHO]);
    let mut echo = echo.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(echo.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("ready"));

    let published = ask(&daemon, "publish dev 7000 --alias shop").await.ok();
    assert!(published.contains(".localhost:") && published.contains("/shop/"), "{published}");
    let listed = ask(&daemon, "ports dev").await.ok();
    assert_eq!(rows(&listed)[0][..3], ["dev", "7000", "yes"]);
    assert!(rows(&listed)[0][3].starts_with("http://shop."), "{listed}");
    assert_eq!(ask(&daemon, "ports -q").await.ok(), "7000\n");
    assert_eq!(ask(&daemon, "unpublish dev 7000").await.ok(), "unpublished 7000\n");

    let mut forward = daemon.cli(&["forward", "dev", "7000", "0"]);
    let mut forward = forward.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(forward.stdout.take().unwrap()).lines();
    let line = said.next_line().await.unwrap().unwrap();
    let address = line.split('\t').next().unwrap().to_owned();
    let talk = async |length: usize| {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let sent: Vec<u8> = (0..length).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let (mut reader, mut writer) = stream.split();
        let send = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut back = Vec::new();
        let receive = async { reader.read_to_end(&mut back).await.unwrap() };
        timeout(LIMIT, async { tokio::join!(send, receive) }).await.unwrap();
        assert_eq!(back.len(), length + 3);
        assert!(back[..length] == sent && back.ends_with(b"bye"));
    };
    tokio::join!(talk(5), talk(3_000_000), talk(0));
    let taken =
        ask(&daemon, &format!("forward dev 7000 {}", address.rsplit(':').next().unwrap())).await;
    assert!(taken.failed(1).contains("cannot listen"));
    forward.kill().await.unwrap();
    let refused = daemon.client.forward("dev", 7001).await;
    assert!(refused.err().unwrap().to_string().contains("7001"));
}

#[tokio::test]
async fn events_are_followed_and_remaining_commands_answer() {
    let mut daemon = TestDaemon::start().await;
    let mut follow = daemon.cli(&["events", "--follow", "--type", "sandbox.", "--json"]);
    let mut follow = follow.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    // A stream has only events after it was opened, so sandboxes are created until one is reported.
    let mut made = 0;
    let line = loop {
        made += 1;
        ask(&daemon, &format!("create --name s{made}")).await.ok();
        let wait = std::time::Duration::from_millis(500);
        if let Ok(line) = timeout(wait, lines.next_line()).await {
            break line.unwrap().unwrap();
        }
        assert!(made < 20, "no event was reported");
    };
    let event: Value = serde_json::from_str(&line).unwrap();
    assert!(event["type"].as_str().unwrap().starts_with("sandbox."), "{event}");

    let listed = ask(&daemon, "events --sandbox s1").await.ok();
    assert!(
        rows(&listed).iter().any(|row| row[2] == "sandbox.created" && row[3] == "s1"),
        "{listed}"
    );
    assert!(ask(&daemon, "metrics").await.ok().contains("bhatti_http_request_seconds"));
    assert!(ask(&daemon, "version --json").await.json()["version"].is_string());
    for shell in ["bash", "zsh", "fish"] {
        assert!(ask(&daemon, &format!("completion {shell}")).await.ok().contains("destroy"));
    }
    let plot = daemon.data_dir().join("plot.svg");
    let bench = format!("bench --samples 2 --json --plot {}", plot.display());
    let report = ask(&daemon, &bench).await.json();
    assert!(report["machine"]["cpus"].as_u64().unwrap() > 0, "{report}");
    let figures = report["figures"].as_array().unwrap();
    let skipped = if engine_has(Feature::SavedMemory) { 0 } else { 2 };
    assert_eq!(
        (figures.len(), report["skipped"].as_array().unwrap().len()),
        (9 - skipped, skipped)
    );
    assert!(figures.iter().all(|f| f["p50_ms"].as_f64().unwrap() > 0.0));
    assert!(std::fs::read_to_string(plot).unwrap().contains("wake, n = 2"));
    assert_eq!(daemon.client.list().await.unwrap().len(), made, "the benchmark left a sandbox");

    daemon.terminate().await;
    let ended = timeout(LIMIT, follow.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("the daemon has stopped"));
    daemon.serve().await;
    wait_for("the socket", || daemon.data_dir().join("bhatti.sock").exists()).await;
}

#[tokio::test]
async fn usage_is_reported_and_wakes_no_sandbox() {
    let daemon = TestDaemon::start().await;
    ask(&daemon, "create --name dev").await.ok();
    ask(&daemon, "create --name other").await.ok();
    ask(&daemon, "stop other").await.ok();
    ask(&daemon, "pause dev").await.ok();

    let used = daemon.client.usage().await.unwrap();

    let dev = daemon.client.inspect("dev").await.unwrap();
    assert_eq!(used.len(), 1);
    assert_eq!((&used[0].sandbox_id, dev.thermal.as_deref()), (&dev.id, Some("warm")));
    assert!(used[0].cpu_ms > 0 && used[0].memory_bytes > 1 << 18, "{used:?}");
}

/// Columns that differ from run to run.
const VARYING: [&str; 9] =
    ["ID", "CREATED", "CHANGED", "UPDATED", "ON DISK", "SAVED", "KIND", "ADDRESS", "SOURCE"];

/// Replaces varying cells of a table by `…`, unless they are empty.
fn redacted(table: &str) -> String {
    let header: Vec<&str> = table.lines().next().unwrap_or_default().split('\t').collect();
    let cell = |(title, text): (&&str, &str)| {
        let varies = VARYING.contains(title) && !text.is_empty() && text != *title;
        if varies { "…".to_owned() } else { text.to_owned() }
    };
    let line = |line: &str| header.iter().zip(line.split('\t')).map(cell).collect::<Vec<_>>();
    table.lines().map(|text| line(text).join(" | ") + "\n").collect()
}

#[tokio::test]
async fn tables_match_their_snapshot() {
    if !needs(Feature::SavedMemory) {
        return;
    }
    let daemon = TestDaemon::start().await;
    with_input(&daemon, "secret set KEY", b"value").await.ok();
    for line in [
        "volume create data --size 64",
        "create --name dev --cpus 1 --memory 256 --label team=web --volume data:/data",
        "template create small --cpus 1 --memory 256",
        "snapshot create dev ready",
        "exec -d dev -- sleep 1000",
        "publish dev 7000 --alias shop",
        "user create alice",
        "file mkdir dev made",
        "stop dev",
        "start dev",
    ] {
        ask(&daemon, line).await.ok();
    }
    let mut tables = String::new();
    for line in [
        "list",
        "ps dev",
        "secret list",
        "volume list",
        "template list",
        "snapshot list",
        "image list",
        "user list",
        "ports dev",
        "file ls dev /workspace",
    ] {
        tables += &format!("$ bhatti {line}\n{}\n", redacted(&ask(&daemon, line).await.ok()));
    }
    insta::assert_snapshot!("tables", tables);
}
