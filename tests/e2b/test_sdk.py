"""E2B's Python package, unmodified, against a bhatti daemon. `scripts/test-e2b.sh` starts both."""

import asyncio
import datetime
import gzip
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

import pytest
from e2b import (
    AsyncSandbox,
    AuthenticationException,
    BuildException,
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    RateLimitException,
    Sandbox,
    SandboxException,
    SandboxQuery,
    SandboxState,
    Template,
    TimeoutException,
    wait_for_port,
)

BASE = os.environ["E2B_API_URL"]
LIMIT = 60
SERVER = "cd served && python3 -m http.server 8123"


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox.create("base", timeout=600, metadata={"suite": "python", "of": "a b/c"}, envs={"GIVEN": "yes"})
    yield made
    made.kill()


def until(condition):
    """Waits until a condition holds."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.05)


def request(sandbox, path, body=None, headers=None, method=None):
    """Sends a request to the sandbox side. Returns status and body."""
    headers = {
        "E2b-Sandbox-Id": sandbox.sandbox_id,
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": sandbox._envd_access_token,
        **(headers or {}),
    }
    headers = {name: value for name, value in headers.items() if value is not None}
    return send(path, body, headers, method)


def send(path, body, headers, method):
    """Sends a request. Returns status and body."""
    asked = urllib.request.Request(BASE + path, data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def api(method, path, body=None, headers=None):
    """Sends a request to the control plane. Returns status and body."""
    headers = {"X-API-KEY": os.environ["E2B_API_KEY"], "Content-Type": "application/json", **(headers or {})}
    return send(path, body, headers, method)


# Sandboxes


def test_info_and_lists_find_the_sandbox(sandbox):
    info = sandbox.get_info()
    assert (info.sandbox_id, info.template_id, info.state) == (sandbox.sandbox_id, "base", SandboxState.RUNNING)
    assert info.metadata == {"suite": "python", "of": "a b/c"}
    assert 500 < (info.end_at - info.started_at).total_seconds() < 700

    def ids(**query):
        return [found.sandbox_id for found in Sandbox.list(query=SandboxQuery(**query)).next_items()]

    assert sandbox.sandbox_id in ids()
    assert ids(metadata={"of": "a b/c"}) == [sandbox.sandbox_id]
    assert ids(metadata={"of": "other"}) == []
    assert sandbox.sandbox_id not in ids(state=[SandboxState.PAUSED])


def test_creation_with_an_idempotency_key_is_carried_out_once():
    key, other = f"key-{uuid.uuid4()}", f"key-{uuid.uuid4()}"
    first = Sandbox.create("base", timeout=120, metadata={"key": key}, idempotency_key=key)
    try:
        again = Sandbox.create("base", timeout=120, metadata={"key": key}, idempotency_key=key)
        assert again.sandbox_id == first.sandbox_id
        assert again.commands.run("echo here").stdout == "here\n"
        with pytest.raises(SandboxException, match="422.*used for another request"):
            Sandbox.create("base", timeout=121, metadata={"key": key}, idempotency_key=key)
        # A creation that is refused uses no key up.
        with pytest.raises(SandboxException, match="404"):
            Sandbox.create("no-such-template", metadata={"key": key}, idempotency_key=other)
        found = Sandbox.list(query=SandboxQuery(metadata={"key": key})).next_items()
        assert [info.sandbox_id for info in found] == [first.sandbox_id]
    finally:
        first.kill()
    body = json.dumps({"templateID": "base", "timeout": 121, "metadata": {"key": key}}).encode()
    status, answer = api("POST", "/v2/sandboxes", body, {"Idempotency-Key": key})
    assert (status, json.loads(answer)["error_code"]) == (422, "idempotency_request_mismatch")
    status, answer = api("POST", "/v2/sandboxes", body, {"Idempotency-Key": "x" * 256})
    assert status == 400 and "Idempotency-Key" in json.loads(answer)["message"]


def test_list_has_pages(sandbox):
    other = Sandbox.create("base", timeout=120)
    try:
        pages = Sandbox.list(limit=1)
        seen = []
        while pages.has_next:
            shown = pages.next_items()
            assert len(shown) == 1
            seen += [found.sandbox_id for found in shown]
        assert {sandbox.sandbox_id, other.sandbox_id} <= set(seen) and len(seen) == len(set(seen))
    finally:
        assert other.kill()
    assert not other.kill() and not Sandbox.kill(other.sandbox_id)


def test_time_limit_is_set_both_ways_and_connect_only_lengthens(sandbox):
    def left():
        info = sandbox.get_info()
        return info.end_at.timestamp() - time.time()

    sandbox.set_timeout(300)
    assert 290 < left() < 310
    sandbox.set_timeout(600)
    assert 590 < left() < 610
    Sandbox.connect(sandbox.sandbox_id, timeout=60)
    assert 500 < left()
    Sandbox.connect(sandbox.sandbox_id, timeout=900)
    assert 890 < left() < 910


def test_sandbox_ends_at_its_time():
    ending = Sandbox.create("base", timeout=300)
    ending.set_timeout(0)
    until(lambda: not ending.is_running())
    with pytest.raises(TimeoutException):
        ending.commands.run("true")
    with pytest.raises(SandboxException):
        ending.get_info()


def test_sandbox_is_paused_with_its_processes_and_connected_again():
    paused = Sandbox.create("base", timeout=300)
    try:
        held = paused.commands.run("sleep 1000", background=True)
        paused.files.write("kept", "content")
        boot = paused.files.read("/proc/sys/kernel/random/boot_id")
        assert paused.pause() and not paused.pause()
        assert paused.get_info().state == SandboxState.PAUSED
        assert not paused.is_running()
        with pytest.raises(TimeoutException):
            paused.commands.run("true")
        with pytest.raises(NotFoundException):
            paused.set_timeout(60)
        again = Sandbox.connect(paused.sandbox_id, timeout=300)
        assert again.files.read("/proc/sys/kernel/random/boot_id") == boot
        assert held.pid in [process.pid for process in again.commands.list()]
        assert again._envd_access_token == paused._envd_access_token
    finally:
        paused.kill()


def test_pause_at_the_end_of_the_time_and_wake_by_a_request():
    paused = Sandbox.create("base", timeout=300, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        paused.files.write("kept", "content")
        paused.set_timeout(0)
        until(lambda: paused.get_info().state == SandboxState.PAUSED)
        assert paused.files.read("kept") == "content"
        assert paused.get_info().state == SandboxState.RUNNING
    finally:
        paused.kill()


def test_fork_has_memory_and_files_of_its_parent(sandbox):
    running = sandbox.commands.run("sleep 1000", background=True)
    sandbox.files.write("of-parent", "before")
    forks = sandbox.fork(timeout=120)
    fork = getattr(forks[0], "sandbox", forks[0]) if isinstance(forks, list) else forks
    try:
        assert fork.sandbox_id != sandbox.sandbox_id
        assert fork.files.read("of-parent") == "before"
        assert running.pid in [process.pid for process in fork.commands.list()]
        fork.files.write("of-parent", "after")
        assert sandbox.files.read("of-parent") == "before"
    finally:
        fork.kill()
        running.kill()


def test_snapshot_is_a_template(sandbox):
    sandbox.files.write("in-snapshot", "x")
    snapshot = sandbox.create_snapshot()
    assert snapshot.snapshot_id in [found.snapshot_id for found in sandbox.list_snapshots().next_items()]
    made = Sandbox.create(snapshot.snapshot_id, timeout=120)
    try:
        assert made.files.read("in-snapshot") == "x"
    finally:
        made.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id)
    assert not Sandbox.delete_snapshot(snapshot.snapshot_id)


def test_snapshot_of_a_name_is_replaced(sandbox):
    for content in ("one", "two"):
        sandbox.files.write("which", content)
        assert sandbox.create_snapshot(name="again").snapshot_id == "again"
    assert [found.snapshot_id for found in Sandbox.list_snapshots(name="again").next_items()] == ["again"]
    made = Sandbox.create("again")
    assert made.files.read("which") == "two"
    made.kill()
    assert Sandbox.delete_snapshot("again")


def test_metrics_tell_the_load(sandbox):
    [metric] = sandbox.get_metrics()
    assert metric.cpu_count == 1 and metric.cpu_used_pct >= 0
    assert 0 < metric.mem_used < metric.mem_total <= 512 << 20
    assert 0 < metric.disk_used < metric.disk_total
    status, body = request(sandbox, "/metrics")
    assert (status, json.loads(body)["mem_total"]) == (200, metric.mem_total)
    old = datetime.datetime(2020, 1, 1)
    assert sandbox.get_metrics(start=old, end=old) == []


def test_network_is_kept_or_refused(sandbox):
    sandbox.update_network({})
    with pytest.raises(SandboxException, match="not offered"):
        sandbox.update_network({"allow_internet_access": False})
    long = json.dumps({"x" * (20 << 10): None}).encode()
    status, body = api("PUT", f"/sandboxes/{sandbox.sandbox_id}/network", long)
    assert status == 400 and "at most 16384" in json.loads(body)["message"]


# Templates


def test_template_is_built_from_steps(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "deep").mkdir()
    (tmp_path / "app" / "deep" / "x.txt").write_text("deep")
    (tmp_path / "one.py").write_text("print('one')")
    (tmp_path / "two.py").write_text("print('two')")
    name = f"built-{uuid.uuid4().hex[:8]}"
    template = (
        Template(file_context_path=tmp_path)
        .from_base_image()
        .set_envs({"GREETING": "hello", "PATH": "/srv/bin:$PATH"})
        .copy("app", "/srv/app", user="root")
        .copy("*.py", "scripts/", mode=0o700)
        .copy("one.py", "/opt/renamed.py")
        .run_cmd("echo $GREETING > /srv/greeting && id -un >> /srv/greeting", user="root")
        .set_workdir("work/place")
        .run_cmd("pwd > here")
        .set_start_cmd("python3 -m http.server 8000", wait_for_port(8000))
    )
    logs = []
    info = Template.build(template, name, cpu_count=1, memory_mb=512, on_build_logs=logs.append)
    assert (info.template_id, Template.exists(name), Template.exists("none-" + name)) == (name, True, False)
    assert any("COPY app /srv/app" in entry.message for entry in logs)

    made = Sandbox.create(name)
    try:
        run = made.commands.run
        assert run("cat /srv/greeting").stdout == "hello\nroot\n"
        assert run("pwd; cat here; echo $GREETING; id -un").stdout == "/home/user/work/place\n" * 2 + "hello\nuser\n"
        assert run("stat -c '%U %a' /home/user/scripts/two.py /srv/app/deep/x.txt").stdout.split("\n")[:2] == [
            "user 700",
            "root 644",
        ]
        assert run("cat /opt/renamed.py; stat -c %U /opt/renamed.py").stdout == "print('one')user\n"
        assert run("curl -s http://127.0.0.1:8000/here").stdout == "/home/user/work/place\n"
    finally:
        made.kill()

    Template.assign_tags(name, ["v1", "stable"])
    assert {tag.tag for tag in Template.get_tags(name)} == {"default", "v1", "stable"}
    Template.remove_tags(name, "stable")
    assert api("DELETE", f"/templates/{name}:gone")[0] == 404
    made = Sandbox.create(f"{name}:v1")
    made.kill()
    with pytest.raises(SandboxException, match="404"):
        Sandbox.create(f"{name}:stable")
    # A template that begins with another, whose user, directory and files it has.
    again = Template().from_template(name).run_cmd("cat here > again; id -un >> again")
    Template.build(again, f"{name}-2")
    made = Sandbox.create(f"{name}-2")
    assert made.files.read("again") == "/home/user/work/place\nuser\n"
    made.kill()
    assert api("DELETE", f"/templates/{name}")[0] == 204 and not Template.exists(name)
    made = Sandbox.create(f"{name}-2")
    made.kill()


def test_failed_builds_say_which_step():
    name = f"failed-{uuid.uuid4().hex[:8]}"
    logs = []
    failing = Template().from_base_image().run_cmd("true").run_cmd("echo broken >&2; exit 3")
    with pytest.raises(BuildException, match="exit code 3"):
        Template.build(failing, name, on_build_logs=logs.append)
    assert any("broken" in entry.message for entry in logs) and not Template.exists(name)
    with pytest.raises(BuildException, match="not found"):
        Template.build(Template().from_template("nothing").run_cmd("true"), name)


def test_links_for_uploads_are_for_one_user_and_hash():
    status, body = api("GET", "/templates/any/files/" + "0" * 64)
    link = json.loads(body)
    assert (status, link["present"]) == (201, False)
    put = urllib.request.Request(link["url"], data=b"x" * 100, method="PUT")
    assert urllib.request.urlopen(put, timeout=LIMIT).status == 200
    assert json.loads(api("GET", "/templates/any/files/" + "0" * 64)[1])["present"]
    assert not json.loads(api("GET", "/templates/any/files/" + "1" * 64)[1])["present"]
    for wrong in (link["url"] + "0", BASE + "/e2b/uploads/"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(wrong, data=b"x", method="PUT"), timeout=LIMIT)
        assert refused.value.code == 404
    assert api("GET", "/templates/any/files/short")[0] == 400


def test_unknown_keys_templates_and_options_are_refused():
    with pytest.raises(AuthenticationException):
        Sandbox.create("base", api_key="e2b_" + "0" * 64)
    with pytest.raises(SandboxException, match="404.*no-such-template"):
        Sandbox.create("no-such-template")
    with pytest.raises(SandboxException, match="network.denyOut"):
        Sandbox.create("base", network={"deny_out": ["10.0.0.0/8"]})
    with pytest.raises(SandboxException, match="timeout"):
        Sandbox.create("base", timeout=0)


def test_full_quota_is_told_and_not_repeated(sandbox):
    made = []
    try:
        with pytest.raises(RateLimitException, match="sandbox limit reached"):
            while len(made) < 10:
                made.append(Sandbox.create("base", timeout=120))
    finally:
        for one in made:
            one.kill()


def test_sandbox_without_internet_has_no_network_card():
    closed = Sandbox.create("base", timeout=120, allow_internet_access=False)
    try:
        assert [entry.name for entry in closed.files.list("/sys/class/net")] == ["lo"]
    finally:
        closed.kill()


# Commands


def test_command_has_output_variables_user_and_directory(sandbox):
    ran = sandbox.commands.run('echo out; echo err >&2; echo "$GIVEN $MORE $E2B_SANDBOX $E2B_SANDBOX_ID"', envs={"MORE": "more"})
    assert ran.stdout == f"out\nyes more true {sandbox.sandbox_id}\n"
    assert (ran.stderr, ran.exit_code, ran.error) == ("err\n", 0, None)
    assert sandbox.commands.run("whoami; pwd").stdout == "user\n/home/user\n"
    assert sandbox.commands.run("whoami; pwd", user="root").stdout == "root\n/root\n"
    assert sandbox.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    sandbox.files.make_dir("below")
    assert sandbox.commands.run("pwd", cwd="below").stdout == "/home/user/below\n"


def test_failed_commands_say_how_they_ended(sandbox):
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo said; exit 3")
    assert (failed.value.exit_code, failed.value.stdout, failed.value.error) == (3, "said\n", "exit status 3")
    with pytest.raises(CommandExitException) as killed:
        sandbox.commands.run("exec sh -c 'kill -9 $$'")
    assert (killed.value.exit_code, killed.value.error) == (-1, "signal: killed")
    with pytest.raises(InvalidArgumentException, match="cwd '/none' does not exist"):
        sandbox.commands.run("true", cwd="/none")
    with pytest.raises(AuthenticationException, match="invalid username: 'missing-user'"):
        sandbox.commands.run("true", user="missing-user")


def test_input_is_sent_in_order_and_closed(sandbox):
    running = sandbox.commands.run("cat", background=True, stdin=True)
    long = "x" * 200_000
    for text in ["one\n", long, "\ntwo\n"]:
        sandbox.commands.send_stdin(running.pid, text)
    sandbox.commands.close_stdin(running.pid)
    assert running.wait().stdout == f"one\n{long}\ntwo\n"


def test_processes_are_listed_connected_and_killed(sandbox):
    running = sandbox.commands.run("echo early; read line; echo late", background=True, stdin=True, envs={"A": "b"})
    listed = {process.pid: process for process in sandbox.commands.list()}[running.pid]
    assert (listed.cmd, listed.args[:2], listed.envs) == ("/bin/bash", ["-l", "-c"], {"A": "b"})
    assert next(iter(running))[0] == "early\n"
    # There is no replay: what was written before is not seen.
    connected = sandbox.commands.connect(running.pid)
    sandbox.commands.send_stdin(running.pid, "\n")
    assert connected.wait().stdout == "late\n"
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(running.pid)
    assert not sandbox.commands.kill(running.pid)

    running = sandbox.commands.run("sleep 1000", background=True)
    assert running.kill()
    with pytest.raises(CommandExitException) as killed:
        running.wait()
    assert killed.value.error == "signal: killed"


def test_process_outlives_its_client(sandbox):
    running = sandbox.commands.run("sleep 1000", background=True)
    running.disconnect()
    assert running.pid in [process.pid for process in sandbox.commands.list()]
    assert sandbox.commands.kill(running.pid)


def test_time_limit_of_a_command_kills_it(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("exec sleep 1234", timeout=1)
    until(lambda: "sleep 1234" not in [" ".join(process.args) for process in sandbox.commands.list()])


def test_terminal_is_resized_and_ends(sandbox):
    said = []
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    sandbox.pty.resize(terminal.pid, PtySize(rows=31, cols=97))
    sandbox.pty.send_stdin(terminal.pid, b"stty size; exit\n")
    terminal.wait(on_pty=said.append)
    assert b"31 97" in b"".join(said)
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    assert sandbox.pty.kill(terminal.pid)


# Files


def test_files_are_written_read_and_described(sandbox):
    name = f"dir {uuid.uuid4()}/ä b.txt"
    written = sandbox.files.write(name, "hello")
    assert written.path == f"/home/user/{name}"
    assert sandbox.files.read(name) == "hello"
    assert bytes(sandbox.files.read(name, format="bytes")) == b"hello"
    assert b"".join(sandbox.files.read(name, format="stream")) == b"hello"
    info = sandbox.files.get_info(name)
    assert (info.size, info.mode, info.permissions) == (5, 0o644, "-rw-r--r--")
    assert (info.owner, info.group) == ("user", "user")
    sandbox.files.write(name, b"")
    assert sandbox.files.read(name) == ""
    large = os.urandom(3 << 20)
    sandbox.files.write("large", large)
    assert bytes(sandbox.files.read("large", format="bytes")) == large
    several = sandbox.files.write_files([{"path": f"several/{n} x", "data": str(n)} for n in range(5)])
    assert [info.name for info in several] == [f"{n} x" for n in range(5)]
    assert sandbox.files.read("several/3 x") == "3"
    with pytest.raises(FileNotFoundException):
        sandbox.files.read("none")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read("several")


def test_write_goes_in_place_and_belongs_to_its_user(sandbox):
    sandbox.commands.run("echo one >first; ln first second; chmod 600 first")
    sandbox.files.write("first", "two")
    assert sandbox.files.read("second") == "two"
    assert sandbox.files.get_info("first").mode == 0o600
    sandbox.files.write("/root/of-root", "x", user="root")
    assert sandbox.files.get_info("/root/of-root").owner == "root"


def test_directories_are_made_listed_renamed_and_removed(sandbox):
    top = f"top-{uuid.uuid4()}"
    assert sandbox.files.make_dir(f"{top}/a/b")
    assert not sandbox.files.make_dir(f"{top}/a/b")
    sandbox.files.write(f"{top}/a/file", "x")
    sandbox.commands.run(f"ln -s a {top}/link")
    assert [entry.name for entry in sandbox.files.list(top)] == ["a", "link"]
    deep = [entry.path for entry in sandbox.files.list(top, depth=3)]
    assert deep == [f"/home/user/{top}/{rest}" for rest in ["a", "a/b", "a/file", "link"]]
    link = sandbox.files.get_info(f"{top}/link")
    assert (link.type.name, link.symlink_target) == ("SYMLINK", f"/home/user/{top}/a")
    moved = sandbox.files.rename(f"{top}/a/file", f"{top}/new/place")
    assert moved.path == f"/home/user/{top}/new/place"
    assert sandbox.files.exists(f"{top}/new/place") and not sandbox.files.exists(f"{top}/a/file")
    sandbox.files.remove(top)
    sandbox.files.remove(top)
    assert not sandbox.files.exists(top)
    with pytest.raises(FileNotFoundException):
        sandbox.files.list(top)


def test_metadata_of_a_file_is_kept_and_replaced(sandbox):
    sandbox.files.write("described", "x", metadata={"one": "1"})
    assert sandbox.files.get_info("described").metadata == {"one": "1"}
    sandbox.files.write("described", "y", metadata={"two": "2"})
    assert sandbox.files.get_info("described").metadata == {"two": "2"}


def test_watch_reports_what_a_write_does(sandbox):
    sandbox.files.make_dir("watched/below")
    watch = sandbox.files.watch_dir("watched", recursive=True)
    sandbox.files.write("watched/below/file", "x")
    events = [(event.type.name, event.name) for event in watch.get_new_events()]
    assert events == [("CREATE", "below/file"), ("CHMOD", "below/file"), ("WRITE", "below/file")]
    sandbox.files.rename("watched/below/file", "watched/moved")
    sandbox.files.remove("watched/moved")
    events = [(event.type.name, event.name) for event in watch.get_new_events()]
    assert events == [("RENAME", "below/file"), ("CREATE", "moved"), ("REMOVE", "moved")]
    watch.stop()
    with pytest.raises(SandboxException):
        watch.get_new_events()
    with pytest.raises(FileNotFoundException):
        sandbox.files.watch_dir("none")


def test_watchers_have_a_limit(sandbox):
    watches = []
    with pytest.raises(RateLimitException):
        while len(watches) <= 64:
            watches.append(sandbox.files.watch_dir("/tmp"))
    assert len(watches) > 30
    for watch in watches:
        watch.stop()
    sandbox.files.watch_dir("/tmp").stop()


def test_watch_reports_a_thousand_changes_in_order(sandbox):
    sandbox.files.make_dir("many")
    watch = sandbox.files.watch_dir("many")
    sandbox.commands.run("cd many; for i in $(seq 1000); do mkdir $i; done")
    assert [event.name for event in watch.get_new_events()] == [str(n) for n in range(1, 1001)]
    watch.stop()


def test_signed_urls_serve_files_until_they_expire(sandbox):
    sandbox.files.write("signed", "content")

    def status(url, body=None, **headers):
        asked = urllib.request.Request(url, data=body, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["message"]

    url = sandbox.download_url("signed")
    assert status(url) == (200, b"content")
    assert status(sandbox.download_url("signed", use_signature_expiration=100)) == (200, b"content")
    assert status(sandbox.download_url("signed", use_signature_expiration=-100))[1] == "signature is already expired"
    assert status(url.replace("signature=v1_", "signature=v1_x"))[0] == 401
    assert status(url.replace("path=signed", "path=other"))[0] == 401
    # A signature for reading does not allow a write.
    assert status(url, b"x", **{"Content-Type": "application/octet-stream"})[0] == 401
    put = sandbox.upload_url("uploaded")
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nup\r\n--b--\r\n'
    assert status(put, form, **{"Content-Type": "multipart/form-data; boundary=b"})[0] == 200
    assert sandbox.files.read("uploaded") == "up"


# Ports


def test_port_is_reached_by_headers_and_a_closed_one_is_502(sandbox):
    sandbox.files.write("served/index.html", "page")
    server = sandbox.commands.run(SERVER, background=True)
    try:
        to_port = {"E2b-Sandbox-Port": "8123", "X-Access-Token": None}
        until(lambda: request(sandbox, "/index.html", headers=to_port)[0] == 200)
        assert request(sandbox, "/index.html", headers=to_port)[1] == b"page"
    finally:
        server.kill()
    status, body = request(sandbox, "/", headers={"E2b-Sandbox-Port": "8124"})
    assert status == 502 and "port is not open" in json.loads(body)["message"]


def test_private_ports_need_their_token():
    private = Sandbox.create("base", timeout=120, network={"allow_public_traffic": False})
    try:
        token = private.traffic_access_token
        port = {"E2b-Sandbox-Port": "8123"}
        assert request(private, "/", headers=port)[0] == 403
        assert request(private, "/", headers={**port, "e2b-traffic-access-token": "x"})[0] == 403
        assert request(private, "/", headers={**port, "e2b-traffic-access-token": token})[0] == 502
        assert private.commands.run("echo ran").stdout == "ran\n"
    finally:
        private.kill()


# Bad input


def test_bad_calls_get_the_error_that_the_protocol_names(sandbox):
    unary = {"Content-Type": "application/json"}
    stream = {"Content-Type": "application/connect+json"}

    def called(path, body, headers):
        status, answer = request(sandbox, path, body, headers)
        if answer[:1] == b"\x02":
            answer = json.dumps(json.loads(answer[5:])["error"]).encode()
        try:
            return status, json.loads(answer).get("code")
        except ValueError:
            return status, None

    stat = "/filesystem.Filesystem/Stat"
    assert called(stat, b"{", unary) == (400, "invalid_argument")
    assert called(stat, b'{"path": "/none"}', unary) == (404, "not_found")
    assert called(stat, b'{"path": "~other/x"}', unary) == (400, "invalid_argument")
    assert called(stat, b'{"path": "/", "unknown": 1}', unary) == (200, None)
    assert called(stat, b"{}", {"Content-Type": "application/proto"}) == (415, None)
    assert called(stat, b'{"path": "' + b"x" * (5 << 20) + b'"}', unary) == (429, "resource_exhausted")
    assert called(stat, b"{}", {**unary, "Content-Encoding": "br"}) == (501, "unimplemented")
    start = "/process.Process/Start"
    assert called(start, b"\0\0\0\0\2{}", stream) == (200, "invalid_argument")
    assert called(start, b"\1\0\0\0\2{}", stream) == (200, "internal")
    assert called(start, b"\0\xff\0\0\2{}", stream) == (200, "resource_exhausted")
    assert called(start, b"\0\0\0", stream) == (200, "invalid_argument")
    assert called(start, b"", stream) == (200, "unimplemented")
    assert called(start, b"{}", unary) == (415, None)
    kill = "/process.Process/SendSignal"
    assert called(kill, b'{"process": {"pid": 999999}, "signal": "SIGNAL_SIGKILL"}', unary) == (404, "not_found")
    assert called(kill, b'{"signal": "SIGNAL_SIGKILL"}', unary) == (400, "invalid_argument")
    assert called("/process.Process/None", b"{}", unary)[0] == 404
    assert called("/other.Service/None", b"{}", unary)[0] == 404
    assert called("/init", b"{}", unary)[0] == 404


def test_tokens_and_names_of_other_sandboxes_are_refused(sandbox):
    other = Sandbox.create("base", timeout=120)
    try:
        unary = {"Content-Type": "application/json"}
        path, body = "/filesystem.Filesystem/Stat", b'{"path": "/"}'
        assert request(sandbox, path, body, {**unary, "X-Access-Token": other._envd_access_token})[0] == 401
        assert request(sandbox, path, body, {**unary, "X-Access-Token": None})[0] == 401
        assert request(sandbox, "/health", headers={"X-Access-Token": None})[0] == 204
        for headers in [{"E2b-Sandbox-Port": None}, {"E2b-Sandbox-Id": "a-b"}, {"E2b-Sandbox-Port": "0"}]:
            assert request(sandbox, "/health", headers=headers)[0] == 400, headers
        assert request(sandbox, "/health", headers={"E2b-Sandbox-Id": "0" * 16})[0] == 502
    finally:
        other.kill()


def test_key_that_may_only_look_gets_no_token_and_changes_nothing(sandbox):
    def native(path, key, method="GET", body=None, name="Authorization", kind="Bearer "):
        asked = urllib.request.Request(BASE + path, method=method, data=body, headers={name: kind + key})
        with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
            return json.loads(answer.read() or b"null")

    own = "bht_" + os.environ["E2B_API_KEY"].removeprefix("e2b_")
    looks = native("/keys", own, "POST", json.dumps({"name": "looks", "scope": "read"}).encode())
    key = next(value for value in looks.values() if str(value).startswith("bht_"))
    path = f"/e2b/sandboxes/{sandbox.sandbox_id}"
    assert "envdAccessToken" in native(path, own, name="X-API-KEY", kind="")
    assert "envdAccessToken" not in native(path, key, name="X-API-KEY", kind="")
    for method, refused in (("DELETE", path), ("GET", "/e2b/templates/any/files/" + "0" * 64)):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            native(refused, key, method, name="X-API-KEY", kind="")


def test_signed_url_is_for_its_user_alone(sandbox):
    sandbox.files.write("/root/secret", "of root", user="root")
    url = urllib.parse.urlsplit(sandbox.download_url("~/secret"))
    named = {"X-Access-Token": None, "Authorization": "Basic cm9vdDo="}
    status, body = request(sandbox, f"{url.path}?{url.query}", headers=named)
    assert status == 404, body


def test_strangers_wake_no_paused_sandbox():
    paused = Sandbox.create("base", timeout=300, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        assert paused.pause()
        for path, body in [("/health", None), ("/files?path=x", None), ("/process.Process/List", b"{}")]:
            headers = {"X-Access-Token": None, "Content-Type": "application/json"}
            assert request(paused, path, body, headers)[0] in (401, 502), path
        assert paused.get_info().state == SandboxState.PAUSED
        assert paused.is_running()
    finally:
        paused.kill()


def test_form_without_an_end_of_its_head_is_refused(sandbox):
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    endless = b"--b\r\nContent-Disposition: " + b"x" * (8 << 20)
    assert request(sandbox, "/files?path=target", endless, form)[0] == 400


def test_metadata_has_a_limit():
    with pytest.raises(SandboxException, match="metadata and options"):
        Sandbox.create("base", metadata={"long": "x" * 20_000})


def test_bad_uploads_change_nothing(sandbox):
    sandbox.files.write("target", "before")
    octets = {"Content-Type": "application/octet-stream"}
    assert request(sandbox, "/files", b"x", octets)[0] == 400
    assert request(sandbox, "/files?path=target", b"x", {"Content-Type": "text/plain"})[0] == 400
    assert request(sandbox, "/files?path=target", b"x", {**octets, "Content-Encoding": "br"})[0] == 400
    assert request(sandbox, "/files?path=target", b"x", {**octets, "X-Metadata-" + "k" * 300: "v"})[0] == 400
    assert request(sandbox, "/files?path=target&username=missing-user", b"x", octets)[0] == 401
    assert sandbox.files.read("target") == "before"
    packed = gzip.compress(b"unpacked" * 1000)
    assert request(sandbox, "/files?path=packed", packed, {**octets, "Content-Encoding": "gzip"})[0] == 200
    assert sandbox.files.read("packed") == "unpacked" * 1000
    assert request(sandbox, "/files?path=packed", b"no gzip", {**octets, "Content-Encoding": "gzip"})[0] == 400


# Both APIs, and many at once


def test_native_api_shows_the_same_sandboxes(sandbox):
    def native(path, method="GET", body=None):
        headers = {"Authorization": "Bearer bht_" + os.environ["E2B_API_KEY"].removeprefix("e2b_")}
        asked = urllib.request.Request(BASE + path, method=method, data=body, headers=headers)
        with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
            return json.loads(answer.read())

    shown = native(f"/sandboxes/{sandbox.sandbox_id}")
    assert shown["labels"] == {"suite": "python"}
    running = sandbox.commands.run("echo said; sleep 1000", background=True)
    jobs = native(f"/sandboxes/{sandbox.sandbox_id}/jobs")
    assert any("echo said; sleep 1000" in str(job) for job in jobs)
    running.kill()
    made = native("/sandboxes", "POST", b'{"labels": {"by": "native"}}')
    try:
        info = Sandbox.get_info(made["id"])
        assert info.metadata == {"by": "native"}
        assert Sandbox.connect(made["id"]).commands.run("echo ran").stdout == "ran\n"
    finally:
        assert Sandbox.kill(made["id"])


def test_asynchronous_package_runs_many_commands_at_once():
    async def run():
        sandbox = await AsyncSandbox.create("base", timeout=300)
        try:
            ran = await asyncio.gather(*(sandbox.commands.run(f"echo {n}") for n in range(40)))
            assert [one.stdout for one in ran] == [f"{n}\n" for n in range(40)]
            events = []
            watch = await sandbox.files.watch_dir("/tmp", on_event=lambda event: events.append(event.name))
            await sandbox.files.write("/tmp/new", "x")
            for _ in range(LIMIT * 20):
                if "new" in events:
                    break
                await asyncio.sleep(0.05)
            assert "new" in events
            await watch.stop()
            with pytest.raises(TimeoutException):
                await sandbox.commands.run("sleep 1000", timeout=1)
        finally:
            assert await sandbox.kill()

    asyncio.run(run())
