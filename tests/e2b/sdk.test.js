// E2B's JavaScript package, unmodified, against a bhatti daemon. `scripts/test-e2b.sh` starts both.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { CommandExitError, NotFoundError, Sandbox, TimeoutError } from "e2b";

let sandbox;

before(async () => {
  sandbox = await Sandbox.create("base", { timeoutMs: 600_000, metadata: { suite: "js" }, envs: { GIVEN: "yes" } });
});
after(async () => {
  await sandbox?.kill();
});

async function until(condition) {
  const end = Date.now() + 60_000;
  while (!(await condition())) {
    assert(Date.now() < end, "the condition never held");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

test("info and lists find the sandbox", async () => {
  const info = await sandbox.getInfo();
  assert.equal(info.sandboxId, sandbox.sandboxId);
  assert.deepEqual(info.metadata, { suite: "js" });
  const found = await Sandbox.list({ query: { metadata: { suite: "js" } } }).nextItems();
  assert.deepEqual(found.map((one) => one.sandboxId), [sandbox.sandboxId]);
});

test("commands run with variables, users and errors", async () => {
  const ran = await sandbox.commands.run("echo out; echo err >&2; echo $GIVEN $MORE", { envs: { MORE: "more" } });
  assert.deepEqual([ran.stdout, ran.stderr, ran.exitCode], ["out\nyes more\n", "err\n", 0]);
  assert.equal((await sandbox.commands.run("whoami", { user: "root" })).stdout, "root\n");
  await assert.rejects(sandbox.commands.run("exit 3"), (error) => error instanceof CommandExitError && error.exitCode === 3);
  await assert.rejects(sandbox.commands.run("sleep 1000", { timeoutMs: 1000 }), TimeoutError);
});

test("input is sent and closed, processes are listed and killed", async () => {
  const running = await sandbox.commands.run("cat", { background: true, stdin: true });
  await sandbox.commands.sendStdin(running.pid, "one\n");
  await sandbox.commands.closeStdin(running.pid);
  assert.equal((await running.wait()).stdout, "one\n");
  const sleeping = await sandbox.commands.run("sleep 1000", { background: true });
  assert((await sandbox.commands.list()).some((process) => process.pid === sleeping.pid));
  assert.equal(await sandbox.commands.kill(sleeping.pid), true);
  assert.equal(await sandbox.commands.kill(sleeping.pid), false);
  await assert.rejects(sandbox.commands.connect(sleeping.pid), NotFoundError);
});

test("terminal is resized and ends", async () => {
  let said = "";
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData: (data) => (said += Buffer.from(data).toString()) });
  await sandbox.pty.resize(terminal.pid, { cols: 97, rows: 31 });
  await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode("stty size; exit\n"));
  await terminal.wait();
  assert.match(said, /31 97/);
});

test("files are written, read, listed and watched", async () => {
  assert.equal((await sandbox.files.write("js dir/ä b", "hello")).path, "/home/user/js dir/ä b");
  assert.equal(await sandbox.files.read("js dir/ä b"), "hello");
  await sandbox.files.write("empty", "");
  assert.equal(await sandbox.files.read("empty"), "");
  assert.deepEqual((await sandbox.files.list("js dir")).map((entry) => entry.name), ["ä b"]);
  assert.equal(await sandbox.files.makeDir("made/below"), true);
  assert.equal(await sandbox.files.makeDir("made/below"), false);
  const events = [];
  const watch = await sandbox.files.watchDir("made", (event) => events.push(`${event.type} ${event.name}`), { recursive: true });
  await sandbox.files.write("made/below/file", "x");
  await until(() => events.length >= 3);
  assert.deepEqual(events, ["create below/file", "chmod below/file", "write below/file"]);
  await watch.stop();
  await sandbox.files.remove("made");
  assert.equal(await sandbox.files.exists("made"), false);
  const response = await fetch(await sandbox.downloadUrl("js dir/ä b"));
  assert.equal(await response.text(), "hello");
});

test("sandbox is paused, connected again and killed", async () => {
  const paused = await Sandbox.create("base", { timeoutMs: 300_000 });
  assert.equal(await paused.isRunning(), true);
  assert.equal(await paused.pause(), true);
  assert.equal(await paused.pause(), false);
  assert.equal(await paused.isRunning(), false);
  const again = await Sandbox.connect(paused.sandboxId);
  assert.equal((await again.commands.run("echo back")).stdout, "back\n");
  assert.equal(await again.kill(), true);
  assert.equal(await again.kill(), false);
});

test("many commands run at once", async () => {
  const ran = await Promise.all([...Array(40).keys()].map((n) => sandbox.commands.run(`echo ${n}`)));
  assert.deepEqual(ran.map((one) => one.stdout), [...Array(40).keys()].map((n) => `${n}\n`));
});
