import { useCallback, useEffect, useState } from "preact/hooks";
import { type ApiError, call, get, of } from "./api";
import type { Port, Publication } from "./types";
import { Trouble, useAction } from "./widgets";

interface Row {
  port: number;
  listens: boolean;
  publication: Publication | undefined;
}

/**
 * Ports of a sandbox. Links lead only to published ports, which have their own origin: a page of
 * the sandbox below the API's address could reach this page's key.
 */
export function Ports({ sandbox }: { sandbox: string }) {
  const [rows, setRows] = useState<Row[]>();
  const [error, setError] = useState<ApiError>();
  const load = useCallback(async () => {
    try {
      const [listening, published] = await Promise.all([
        get<Port[]>(of(sandbox, "/ports")),
        get<Publication[]>(of(sandbox, "/publish")),
      ]);
      const numbers = new Set([...listening.map((one) => one.container_port), ...published.map((one) => one.port)]);
      const row = (port: number): Row => ({
        port,
        listens: listening.some((one) => one.container_port === port),
        publication: published.find((one) => one.port === port),
      });
      setRows([...numbers].sort((a, b) => a - b).map(row));
      setError(undefined);
    } catch (failure) {
      setError(failure as ApiError);
    }
  }, [sandbox]);
  useEffect(() => void load(), [load]);
  const change = useAction(async ({ port, publication }: Row) => {
    if (publication) await call("DELETE", of(sandbox, `/publish/${port}`));
    else await call("POST", of(sandbox, "/publish"), { port });
    await load();
  });
  return (
    <section>
      <div class="bar">
        <p class="hint">Published ports are public: requests need no API key.</p>
        <button onClick={() => void load()}>Refresh</button>
      </div>
      <Trouble error={error ?? change.error} />
      {rows?.length === 0 && <p class="empty">No listening ports and no published ports.</p>}
      <ul class="entries">
        {rows?.map((row) => (
          <li key={row.port}>
            <span>
              {row.port}
              {!row.listens && <span class="hint"> (not listening)</span>}
            </span>
            <span class="grow">
              <Links publication={row.publication} />
            </span>
            <button class="small" disabled={change.pending} onClick={() => change.run(row)}>
              {row.publication ? "Unpublish" : "Publish"} {row.port}
            </button>
          </li>
        ))}
      </ul>
    </section>
  );
}

function Links({ publication }: { publication: Publication | undefined }) {
  if (!publication) return null;
  if (!publication.urls?.length) {
    return <span class="hint">{publication.alias}: the daemon has no public listener; set public_listen</span>;
  }
  return (
    <>
      {publication.urls.map((url) => (
        <a key={url} href={url} target="_blank" rel="noopener noreferrer">
          {url}
        </a>
      ))}
    </>
  );
}
