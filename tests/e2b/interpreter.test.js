// E2B's JavaScript package of the code interpreter, unmodified, against a bhatti daemon.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { NotFoundError, Sandbox, TimeoutError } from "@e2b/code-interpreter";

let sandbox;

before(async () => {
  sandbox = await Sandbox.create({ timeoutMs: 600_000, envs: { GIVEN: "yes" } });
});
after(async () => {
  await sandbox?.kill();
});

test("code runs in one state, with results, output and errors", async () => {
  const out = [];
  const ran = await sandbox.runCode("import os\nx = 41\nprint(os.environ['GIVEN'])\nx + 1", { onStdout: (piece) => out.push(piece.line) });
  assert.deepEqual([ran.text, ran.logs.stdout, out, ran.error], ["42", ["yes\n"], ["yes\n"], undefined]);
  const failed = await sandbox.runCode("x / 0");
  assert.equal(failed.error.name, "ZeroDivisionError");
  const figure = await sandbox.runCode("import matplotlib.pyplot as plt; plt.bar(['a'], [1]); plt.show()");
  assert.equal(figure.results[0].chart.type, "bar");
  assert.ok(figure.results[0].png);
});

test("contexts are made, listed, restarted and removed", async () => {
  const context = await sandbox.createCodeContext({ language: "js", cwd: "/tmp" });
  assert.equal((await sandbox.runCode("globalThis.y = 1; process.cwd()", { context })).text, "/tmp");
  assert.equal((await sandbox.listCodeContexts()).at(-1).id, context.id);
  await sandbox.restartCodeContext(context);
  assert.equal((await sandbox.runCode("typeof y", { context })).text, "undefined");
  await sandbox.removeCodeContext(context);
  await assert.rejects(sandbox.runCode("1", { context }), NotFoundError);
});

test("client that leaves interrupts its code", async () => {
  await assert.rejects(sandbox.runCode("while True: pass", { timeoutMs: 2000 }), TimeoutError);
  assert.equal((await sandbox.runCode("1 + 1", { timeoutMs: 30_000 })).text, "2");
});
