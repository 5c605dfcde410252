import { useEffect, useRef, useState } from "preact/hooks";
import { Connection } from "./connection";

/** A terminal in a sandbox. Its session goes on when the page is left, and is found again. */
export function TerminalView({ sandbox }: { sandbox: string }) {
  const place = useRef<HTMLDivElement>(null);
  const [status, setStatus] = useState("connecting…");
  useEffect(() => {
    if (!place.current) return;
    const connection = new Connection(sandbox, place.current, setStatus);
    return () => connection.leave();
  }, [sandbox]);
  return (
    <>
      <div class="screen" ref={place} />
      <p class="status" role="status">
        {status}
        <span class="hint"> Ctrl+\ leaves the terminal for the page.</span>
      </p>
    </>
  );
}
