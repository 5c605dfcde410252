import { useState } from "preact/hooks";
import { call, of } from "./api";
import { Files } from "./files";
import type { Fleet } from "./fleet";
import { ago, bytes } from "./format";
import { Ports } from "./ports";
import { TerminalView } from "./terminal";
import type { Sandbox } from "./types";
import { Confirm, State, Trouble, useAction } from "./widgets";

export const TABS = ["terminal", "files", "ports", "details"] as const;
export type Tab = (typeof TABS)[number];

/** One sandbox and its actions. */
export function SandboxView({ sandbox, tab, fleet }: { sandbox: Sandbox; tab: Tab; fleet: Fleet }) {
  return (
    <main class="sandbox">
      <div class="bar">
        <h1>
          <a href="#/" aria-label="All sandboxes">
            ←
          </a>{" "}
          {sandbox.name}
        </h1>
        <State sandbox={sandbox} />
        <Actions sandbox={sandbox} fleet={fleet} />
      </div>
      <nav class="tabs" aria-label="Views of the sandbox">
        {TABS.map((name) => (
          <a key={name} href={`#/${sandbox.id}/${name}`} aria-current={name === tab ? "page" : undefined}>
            {name}
          </a>
        ))}
      </nav>
      <Content sandbox={sandbox} tab={tab} />
    </main>
  );
}

function Content({ sandbox, tab }: { sandbox: Sandbox; tab: Tab }) {
  if (tab !== "details" && sandbox.status !== "running") {
    return <p class="empty">The sandbox is not running. Start it to use it.</p>;
  }
  switch (tab) {
    case "terminal":
      return <TerminalView key={sandbox.id} sandbox={sandbox.id} />;
    case "files":
      return <Files key={sandbox.id} sandbox={sandbox.id} />;
    case "ports":
      return <Ports key={sandbox.id} sandbox={sandbox.id} />;
    case "details":
      return <Details sandbox={sandbox} />;
  }
}

function Actions({ sandbox, fleet }: { sandbox: Sandbox; fleet: Fleet }) {
  const [destroying, setDestroying] = useState(false);
  const { pending, error, run } = useAction(async (what: string) => {
    await call("POST", of(sandbox.id, `/${what}`), {});
    await fleet.refresh();
  });
  const running = sandbox.status === "running";
  return (
    <div class="buttons">
      {running && (
        <>
          <button disabled={pending} onClick={() => run("fork")}>
            Fork
          </button>
          <button disabled={pending} onClick={() => run("stop")}>
            Stop
          </button>
        </>
      )}
      {sandbox.status === "stopped" && (
        <button disabled={pending} onClick={() => run("start")}>
          Start
        </button>
      )}
      <button class="danger" onClick={() => setDestroying(true)}>
        Destroy
      </button>
      <Trouble error={error} />
      {destroying && (
        <Confirm
          question={`Destroy ${sandbox.name}, its files and processes?`}
          yes="Destroy"
          close={() => setDestroying(false)}
          act={async () => {
            await call("DELETE", of(sandbox.id));
            location.hash = "#/";
            await fleet.refresh();
          }}
        />
      )}
    </div>
  );
}

function Details({ sandbox }: { sandbox: Sandbox }) {
  const labels = Object.entries(sandbox.labels).map(([name, value]) => `${name}=${value}`);
  const facts: [string, string][] = [
    ["id", sandbox.id],
    ["isolation", sandbox.isolation === "container" ? "container (shares the host's kernel)" : "VM (own kernel)"],
    ["image", sandbox.image],
    ["CPUs", String(sandbox.cpus)],
    ["memory", bytes(sandbox.memory_mb * 2 ** 20)],
    ["network", sandbox.ip ? `${sandbox.network}, ${sandbox.ip}` : sandbox.network],
    ["origin", sandbox.origin],
    ["created", ago(sandbox.created_at)],
    ["expires", sandbox.expires_at ?? "never"],
    ["pauses", sandbox.keep_hot ? "never" : "when idle"],
    ["labels", labels.join(", ") || "none"],
    ["failure", sandbox.reason ?? "none"],
  ];
  return (
    <dl class="details">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}
