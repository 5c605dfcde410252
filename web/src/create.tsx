import { useEffect, useState } from "preact/hooks";
import { call, get } from "./api";
import type { Fleet } from "./fleet";
import type { Named, Sandbox } from "./types";
import { Dialog, Trouble, useAction } from "./widgets";

/** The request for a new sandbox. The daemon chooses a value for each field that is empty. */
function request(form: FormData): Record<string, unknown> {
  const asked: Record<string, unknown> = {};
  for (const name of ["name", "image", "template", "network"]) {
    const value = String(form.get(name) ?? "").trim();
    if (value) asked[name] = value;
  }
  for (const name of ["cpus", "memory_mb"]) {
    const value = String(form.get(name) ?? "");
    if (value) asked[name] = Number(value);
  }
  if (form.get("keep_hot")) asked["keep_hot"] = true;
  return asked;
}

export function Create({ fleet, close }: { fleet: Fleet; close: () => void }) {
  const images = useNames("/images");
  const templates = useNames("/templates");
  const { pending, error, run } = useAction(async (form: FormData) => {
    const made = await call<Sandbox>("POST", "/sandboxes", request(form));
    await fleet.refresh();
    location.hash = `#/${made.id}/terminal`;
  });
  const submit = async (event: SubmitEvent) => {
    event.preventDefault();
    if (await run(new FormData(event.currentTarget as HTMLFormElement))) close();
  };
  return (
    <Dialog title="New sandbox" close={close}>
      <form onSubmit={submit}>
        <label>
          Name
          <input name="name" placeholder="generated" autofocus spellcheck={false} autocomplete="off" />
        </label>
        <Choice label="Template" name="template" names={templates} none="none" />
        <Choice label="Image" name="image" names={images} none="default" />
        <div class="two">
          <label>
            CPUs
            <input name="cpus" type="number" min="1" placeholder="1" />
          </label>
          <label>
            Memory (MiB)
            <input name="memory_mb" type="number" min="128" step="128" placeholder="512" />
          </label>
        </div>
        <Choice label="Network" name="network" names={["nat", "none"]} none="default" />
        <label class="check">
          <input name="keep_hot" type="checkbox" /> Keep hot (never pause)
        </label>
        <Trouble error={error} />
        <div class="buttons">
          <button type="button" onClick={close}>
            Cancel
          </button>
          <button class="primary" disabled={pending}>
            {pending ? "Creating…" : "Create"}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

function Choice(props: { label: string; name: string; names: string[]; none: string }) {
  return (
    <label>
      {props.label}
      <select name={props.name}>
        <option value="">{props.none}</option>
        {props.names.map((name) => (
          <option key={name}>{name}</option>
        ))}
      </select>
    </label>
  );
}

function useNames(path: string): string[] {
  const [names, setNames] = useState<string[]>([]);
  useEffect(() => {
    get<Named[]>(path).then(
      (list) => setNames(list.map((one) => one.name)),
      () => {},
    );
  }, [path]);
  return names;
}
