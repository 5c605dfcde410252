// Components that several views use.

import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { ApiError } from "./api";
import type { Sandbox } from "./types";

export function Trouble({ error }: { error: ApiError | undefined }) {
  if (!error) return null;
  return (
    <div class="trouble" role="alert">
      {error.message}
      {error.hint && <div class="hint">{error.hint}</div>}
    </div>
  );
}

/** The state of a sandbox. The word is shown, too, because color alone is not accessible. */
export function State({ sandbox }: { sandbox: Sandbox }) {
  const state = sandbox.status === "running" ? (sandbox.thermal ?? "running") : sandbox.status;
  return (
    <span class={`state ${state}`} title={sandbox.reason}>
      {state}
    </span>
  );
}

const WIDTH = 96;
const HEIGHT = 24;

/** Recent usage; `top` is the value at the upper edge. */
export function Sparkline({ points, top, label }: { points: number[]; top: number; label: string }) {
  const step = WIDTH / Math.max(1, points.length - 1);
  const place = (value: number, at: number) =>
    `${(at * step).toFixed(1)},${(HEIGHT - 1 - (Math.min(value, top) / top) * (HEIGHT - 2)).toFixed(1)}`;
  return (
    <svg class="sparkline" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={label}>
      <polyline points={points.map(place).join(" ")} />
    </svg>
  );
}

/** A dialog over the page. Escape closes it, and the focus returns to where it was. */
export function Dialog({ title, close, children }: { title: string; close: () => void; children: ComponentChildren }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  return (
    <dialog ref={dialog} onClose={close} aria-label={title}>
      <h2>{title}</h2>
      {children}
    </dialog>
  );
}

/** Asks for confirmation before an action that cannot be undone. */
export function Confirm(props: { question: string; yes: string; act: () => Promise<void>; close: () => void }) {
  const { pending, error, run } = useAction(props.act);
  return (
    <Dialog title={props.question} close={props.close}>
      <Trouble error={error} />
      <form
        method="dialog"
        class="buttons"
        onSubmit={async (event) => {
          event.preventDefault();
          if (await run()) props.close();
        }}
      >
        <button type="button" onClick={props.close}>
          Cancel
        </button>
        <button class="danger" disabled={pending}>
          {props.yes}
        </button>
      </form>
    </Dialog>
  );
}

/** Runs an action: `pending` lets the view prevent a second run, `error` is its failure. */
export function useAction<A extends unknown[]>(act: (...given: A) => Promise<void>) {
  const [pending, setPending] = useState(false);
  const [error, setError] = useState<ApiError>();
  const run = async (...given: A): Promise<boolean> => {
    setPending(true);
    setError(undefined);
    try {
      await act(...given);
      return true;
    } catch (failure) {
      setError(failure as ApiError);
      return false;
    } finally {
      setPending(false);
    }
  };
  return { pending, error, run };
}
