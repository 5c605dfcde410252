// Tests the console in a real browser, against a real daemon with real VMs.
//
// BHATTI: the program. BHATTI_DATA: a data directory that `bhatti setup` has filled. CHROMIUM: the
// browser. SCREENSHOTS: the directory for screenshots.

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

const program = process.env.BHATTI;
const setUp = process.env.BHATTI_DATA;
const pictures = process.env.SCREENSHOTS;
const LIMIT = 60_000;

let home, data, daemon, browser, address, key;

before(async () => {
  mkdirSync(pictures, { recursive: true });
  home = mkdtempSync(join(tmpdir(), "bhatti-console-"));
  data = join(home, "data");
  mkdirSync(data, { mode: 0o700 });
  for (const name of ["images", "templates"]) symlinkSync(join(setUp, name), join(data, name));
  writeFileSync(join(data, "config.yaml"), "listen: 127.0.0.1:0\npublic_listen: 127.0.0.1:0\nthermal:\n  cold_after_sec: 8\n");
  daemon = spawn(program, ["serve", "--data-dir", data], { stdio: ["ignore", "pipe", "pipe"] });
  address = await new Promise((resolve, reject) => {
    let said = "";
    const read = (chunk) => {
      said += chunk;
      const found = said.match(/for callers with an API key .*address=(\S+)/);
      if (found && said.includes("Daemon ready")) resolve(found[1]);
    };
    daemon.stdout.on("data", read);
    daemon.stderr.on("data", read);
    daemon.on("exit", () => reject(new Error(`the daemon ended:\n${said}`)));
  });
  key = admin("user", "create", "alice", "--quiet").trim();
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  for (const name of key ? alice("list", "--quiet").split("\n").filter(Boolean) : []) alice("destroy", name, "--yes");
  daemon?.removeAllListeners("exit");
  daemon?.kill("SIGTERM");
  rmSync(home, { recursive: true, force: true });
});

const cli = (...words) => execFileSync(program, words, { encoding: "utf8" });
const admin = (...words) => cli("--data-dir", data, ...words);
const alice = (...words) => cli("--url", `http://${address}`, "--token", key, ...words);

/** Opens the console and collects the errors that the browser reports. */
async function open(options = {}) {
  const context = await browser.newContext({ viewport: { width: 1100, height: 760 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(LIMIT);
  const complaints = [];
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.goto(`http://${address}/`);
  return { page, complaints };
}

async function logIn(page, given = key) {
  await page.getByLabel("API key").fill(given);
  await page.getByRole("button", { name: "Log in" }).click();
}

const picture = (page, name) => page.screenshot({ path: join(pictures, `${name}.png`) });
const screen = (page) => page.locator(".xterm-rows");

async function type(page, line) {
  await page.locator(".xterm-helper-textarea").pressSequentially(line);
  await page.keyboard.press("Enter");
}

/** Waits until the terminal shows `text`. */
const shows = (page, text) => screen(page).getByText(text, { exact: false }).first().waitFor();

test("a wrong key is refused and not kept", async () => {
  const { page } = await open();
  await logIn(page, "bht_wrong");
  await page.getByRole("alert").getByText("invalid api key").waitFor();
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
  await picture(page, "log-in");
  await page.context().close();
});

test("a sandbox is created, used by terminal, files and ports, forked and destroyed", async () => {
  const { page, complaints } = await open();
  await logIn(page);
  await page.getByText("No sandboxes yet").waitFor();

  await page.getByRole("button", { name: "New sandbox" }).click();
  await page.getByLabel("Name").fill("Not A Name");
  await page.getByRole("button", { name: "Create" }).click();
  await page.getByRole("dialog").getByRole("alert").waitFor();
  complaints.splice(0, complaints.length, ...complaints.filter((text) => !text.includes("400")));
  await page.getByLabel("Name").fill("web");
  const dialog = page.getByRole("dialog");
  assert.ok(await dialog.evaluate((one) => one.scrollWidth <= one.clientWidth), "no horizontal overflow");
  await picture(page, "create");
  await page.getByRole("button", { name: "Create" }).click();

  await shows(page, "user@web");
  await type(page, "X=kept; echo $((6*7))");
  await shows(page, "42");
  await page.getByRole("status").getByText("session s").waitFor();
  const session = (await page.getByRole("status").textContent()).match(/session (s\w+)/)[1];
  // xterm shows 24-bit colors by `style` attributes, which the page's policy must allow.
  await type(page, "printf '\\033[38;2;255;0;128mcolor\\033[0m\\n'");
  await page.locator('.xterm-rows span[style*="color"]', { hasText: "color" }).first().waitFor();
  await page.setViewportSize({ width: 900, height: 700 });
  await type(page, "clear; stty size");
  await screen(page).getByText(/^\d+ \d+$/).first().waitFor();
  await picture(page, "terminal");

  await page.reload();
  await page.getByRole("status").getByText(`session ${session}, reattached`).waitFor();
  await type(page, "clear; echo X is $X");
  await shows(page, "X is kept");

  // Ctrl+\ moves the focus out of the terminal.
  await page.keyboard.press("Control+\\");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "terminal");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await page.getByText("Empty directory").waitFor();

  await page.getByLabel("Files to upload").setInputFiles({
    name: "räport #1.txt",
    mimeType: "text/plain",
    buffer: Buffer.from("from the browser"),
  });
  const uploaded = page.getByRole("button", { name: "räport #1.txt", exact: true });
  await uploaded.waitFor();
  const [download] = await Promise.all([page.waitForEvent("download"), uploaded.click()]);
  assert.equal(readFileSync(await download.path(), "utf8"), "from the browser");
  await page.getByRole("button", { name: "New directory" }).click();
  await page.getByLabel("Name").fill("made");
  await page.getByRole("button", { name: "Create" }).click();
  await page.getByRole("button", { name: "made/", exact: true }).waitFor();
  await picture(page, "files");
  await page.getByRole("button", { name: "Delete räport #1.txt" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
  await uploaded.waitFor({ state: "detached" });

  await page.getByRole("link", { name: "terminal" }).click();
  await page.getByRole("status").getByText(`session ${session}, reattached`).waitFor();
  await type(page, "python3 -m http.server 8000 >/dev/null 2>&1 &");
  await type(page, "until curl -s localhost:8000 >/dev/null; do sleep 0.1; done; echo it is $((8*1000))");
  await shows(page, "it is 8000");
  await page.getByRole("link", { name: "ports" }).click();
  await page.getByRole("button", { name: "Publish 8000" }).click();
  await page.getByRole("button", { name: "Unpublish 8000" }).waitFor();
  const links = await page.locator(".entries a").evaluateAll((all) => all.map((link) => link.href));
  assert.ok(links.length > 0 && links.every((link) => new URL(link).host !== address), `${links}`);
  await picture(page, "ports");

  await page.getByRole("link", { name: "details" }).click();
  await page.getByText("template").first().waitFor();
  await page.getByRole("button", { name: "Fork" }).click();
  await page.getByRole("link", { name: "All sandboxes" }).click();
  await page.locator(".row").nth(1).waitFor();
  await page.locator(".sparkline").first().waitFor();
  await page.locator(".state.hot").first().waitFor();
  await picture(page, "sandboxes");
  await page.getByRole("link", { name: "Events" }).click();
  await page.getByText("sandbox.forked").first().waitFor();
  await picture(page, "events");
  await page.getByRole("link", { name: "Sandboxes", exact: true }).click();

  await page.locator(".row", { hasText: /^web/ }).first().click();
  await page.getByRole("button", { name: "Destroy" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Cancel" }).click();
  await page.getByRole("button", { name: "Destroy" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Destroy" }).click();
  await page.locator(".row").first().waitFor();
  await page.locator(".row").nth(1).waitFor({ state: "detached" });
  assert.deepEqual(complaints, []);
  await page.context().close();
});

test("the list shows pause, save and stop as they happen, and fits a phone in dark mode", async () => {
  alice("create", "--name", "phone");
  const { page, complaints } = await open({
    viewport: { width: 360, height: 740 },
    colorScheme: "dark",
    hasTouch: true,
    isMobile: true,
  });
  await logIn(page);
  const row = page.locator(".row", { hasText: "phone" });
  await row.waitFor();
  await row.locator(".state.hot").waitFor();
  alice("pause", "phone");
  await row.locator(".state.warm").waitFor();
  await row.locator(".state.cold").waitFor();
  alice("stop", "phone");
  await row.locator(".state.stopped").waitFor();
  const width = () => page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok((await width()) <= 360, "no horizontal overflow");
  await picture(page, "phone-sandboxes");
  await row.click();
  await page.getByText("The sandbox is not running").waitFor();
  await page.getByRole("button", { name: "Start" }).click();
  await shows(page, "user@");
  assert.ok((await width()) <= 360, "no horizontal overflow");
  await picture(page, "phone-terminal");
  const background = () => page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
  const dark = await background();
  await page.getByRole("button", { name: "Dark / light" }).click();
  assert.notEqual(await background(), dark);
  await picture(page, "phone-light");
  await page.getByRole("button", { name: "Log out" }).click();
  await page.getByLabel("API key").waitFor();
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
  assert.deepEqual(complaints, []);
  await page.context().close();
});
