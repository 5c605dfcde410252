import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { type ApiError, call, download, fileOf, get, of, upload } from "./api";
import { ago, bytes } from "./format";
import type { FileEntry } from "./types";
import { Confirm, Dialog, Trouble, useAction } from "./widgets";

const below = (directory: string, name: string) => `${directory === "/" ? "" : directory}/${name}`;

/** The files of a sandbox, one directory at a time. */
export function Files({ sandbox }: { sandbox: string }) {
  const [directory, setDirectory] = useState("/workspace");
  const [entries, setEntries] = useState<FileEntry[]>();
  const [error, setError] = useState<ApiError>();
  const [deleting, setDeleting] = useState<FileEntry>();
  const [making, setMaking] = useState(false);

  const load = useCallback(async () => {
    try {
      const list = await get<FileEntry[]>(fileOf(sandbox, directory, "&ls=true"));
      list.sort((a, b) => Number(b.is_dir) - Number(a.is_dir) || a.name.localeCompare(b.name));
      setEntries(list);
      setError(undefined);
    } catch (failure) {
      setEntries([]);
      setError(failure as ApiError);
    }
  }, [sandbox, directory]);
  useEffect(() => void load(), [load]);

  const { progress, failure, send } = useUpload(sandbox, directory, load);
  const fetching = useAction(async (name: string) => save(await download(sandbox, below(directory, name)), name));
  return (
    <section
      class="files"
      onDragOver={(event) => event.preventDefault()}
      onDrop={(event) => {
        event.preventDefault();
        void send(event.dataTransfer?.files);
      }}
    >
      <div class="bar">
        <Crumbs directory={directory} go={setDirectory} />
        <div class="buttons">
          <button onClick={() => setMaking(true)}>New directory</button>
          <Pick send={send} />
        </div>
      </div>
      {progress && (
        <label class="progress">
          {progress.name} <progress value={progress.part} />
        </label>
      )}
      <Trouble error={error ?? failure ?? fetching.error} />
      {entries?.length === 0 && !error && <p class="empty">Empty directory. Drop files here to upload them.</p>}
      <ul class="entries">
        {entries?.map((entry) => (
          <li key={entry.name}>
            <Entry entry={entry} open={() => setDirectory(below(directory, entry.name))} fetch={fetching.run} />
            <span class="size">{entry.is_dir ? "" : bytes(entry.size)}</span>
            <span class="time">{ago(entry.mtime * 1000)}</span>
            <button class="small" aria-label={`Delete ${entry.name}`} onClick={() => setDeleting(entry)}>
              Delete
            </button>
          </li>
        ))}
      </ul>
      {making && <MakeDirectory sandbox={sandbox} directory={directory} done={load} close={() => setMaking(false)} />}
      {deleting && (
        <Confirm
          question={`Delete ${deleting.name}${deleting.is_dir ? " and its contents" : ""}?`}
          yes="Delete"
          close={() => setDeleting(undefined)}
          act={async () => {
            const path = below(directory, deleting.name);
            await call("DELETE", fileOf(sandbox, path, deleting.is_dir ? "&recursive=true" : ""));
            await load();
          }}
        />
      )}
    </section>
  );
}

function Entry({ entry, open, fetch }: { entry: FileEntry; open: () => void; fetch: (name: string) => unknown }) {
  if (entry.is_dir) {
    return (
      <button class="link directory" onClick={open}>
        {entry.name}/
      </button>
    );
  }
  const target = entry.symlink_target ? ` → ${entry.symlink_target}` : "";
  return (
    <button class="link" title="Download" onClick={() => fetch(entry.name)}>
      {entry.name}
      {target}
    </button>
  );
}

function Crumbs({ directory, go }: { directory: string; go: (path: string) => void }) {
  const names = directory.split("/").filter(Boolean);
  return (
    <nav class="crumbs" aria-label="Parent directories">
      <button class="link" onClick={() => go("/")}>
        /
      </button>
      {names.map((name, at) => (
        <button class="link" key={at} onClick={() => go(`/${names.slice(0, at + 1).join("/")}`)}>
          {name}/
        </button>
      ))}
    </nav>
  );
}

function Pick({ send }: { send: (files: FileList | null) => void }) {
  const input = useRef<HTMLInputElement>(null);
  return (
    <>
      <button class="primary" onClick={() => input.current?.click()}>
        Upload
      </button>
      <input
        ref={input}
        type="file"
        multiple
        hidden
        aria-label="Files to upload"
        onChange={(event) => {
          send(event.currentTarget.files);
        }}
      />
    </>
  );
}

function MakeDirectory(props: { sandbox: string; directory: string; done: () => Promise<void>; close: () => void }) {
  const { pending, error, run } = useAction(async (name: string) => {
    await call("POST", of(props.sandbox, "/files/mkdir"), { path: below(props.directory, name) });
    await props.done();
  });
  const submit = async (event: SubmitEvent) => {
    event.preventDefault();
    const name = String(new FormData(event.currentTarget as HTMLFormElement).get("name"));
    if (await run(name)) props.close();
  };
  return (
    <Dialog title="New directory" close={props.close}>
      <form onSubmit={submit}>
        <label>
          Name
          <input name="name" required autofocus autocomplete="off" spellcheck={false} />
        </label>
        <Trouble error={error} />
        <div class="buttons">
          <button type="button" onClick={props.close}>
            Cancel
          </button>
          <button class="primary" disabled={pending}>
            Create
          </button>
        </div>
      </form>
    </Dialog>
  );
}

/** Uploads files one after the other. */
function useUpload(sandbox: string, directory: string, done: () => Promise<void>) {
  const [progress, setProgress] = useState<{ name: string; part: number }>();
  const { error: failure, run } = useAction(async (files: FileList | null | undefined) => {
    try {
      for (const file of Array.from(files ?? [])) {
        setProgress({ name: file.name, part: 0 });
        const far = (part: number) => setProgress({ name: file.name, part });
        await upload(sandbox, below(directory, file.name), file, far);
      }
    } finally {
      setProgress(undefined);
      await done();
    }
  });
  return { progress, failure, send: run };
}

/** Makes the browser save `content` as a file. */
function save(content: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  // By then the browser has the content, even if it is still writing the file.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
