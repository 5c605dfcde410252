import { useState } from "preact/hooks";
import { Create } from "./create";
import type { Fleet, History } from "./fleet";
import { ago, bytes } from "./format";
import type { Sandbox } from "./types";
import { Sparkline, State, Trouble } from "./widgets";

/** All sandboxes. */
export function List({ fleet }: { fleet: Fleet }) {
  const [creating, setCreating] = useState(false);
  const { sandboxes, history } = fleet;
  return (
    <main>
      <div class="bar">
        <h1>Sandboxes</h1>
        <button class="primary" onClick={() => setCreating(true)}>
          New sandbox
        </button>
      </div>
      <Trouble error={fleet.trouble} />
      {sandboxes?.length === 0 && <p class="empty">No sandboxes yet. Creating one takes a moment.</p>}
      <ul class="sandboxes">
        {sandboxes?.map((sandbox) => (
          <Row key={sandbox.id} sandbox={sandbox} used={history.get(sandbox.id)} />
        ))}
      </ul>
      {creating && <Create fleet={fleet} close={() => setCreating(false)} />}
    </main>
  );
}

function Row({ sandbox, used }: { sandbox: Sandbox; used: History | undefined }) {
  const cpu = used?.cpu ?? [];
  const memory = used?.memory ?? [];
  const percent = Math.round((cpu.at(-1) ?? 0) * 100);
  const resident = memory.at(-1) ?? 0;
  return (
    <li>
      <a href={`#/${sandbox.id}/terminal`} class="row">
        <span class="name">{sandbox.name}</span>
        <State sandbox={sandbox} />
        <span class="use">
          <Sparkline points={cpu} top={1} label={`CPU ${percent} %`} />
          {percent} %
        </span>
        <span class="use">
          <Sparkline points={memory} top={sandbox.memory_mb * 2 ** 20} label={`memory ${bytes(resident)}`} />
          {bytes(resident)}
        </span>
        <span class="facts">
          {sandbox.cpus} CPU, {bytes(sandbox.memory_mb * 2 ** 20)}, {sandbox.image}, {ago(sandbox.created_at)}
        </span>
      </a>
    </li>
  );
}
