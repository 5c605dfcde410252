import { useEffect, useRef, useState } from "preact/hooks";
import { Connection } from "./connection";

/** A terminal in a sandbox. Its session outlives the page, which reattaches to it later. */
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
        <span class="hint"> Ctrl+\ moves the focus out of the terminal.</span>
      </p>
    </>
  );
}
