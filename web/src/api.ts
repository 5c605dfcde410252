// API client that uses the API key of this tab.

import type { BhattiEvent, ErrorBody } from "./types";

const KEY = "bhatti-key";

/** The API key, in the tab's session storage: closing the tab discards it. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value: string) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.clear(),
};

/** An error response of the API, or a failure to reach the daemon. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly code: string,
    readonly hint?: string,
  ) {
    super(message);
  }

  static of(body: ErrorBody): ApiError {
    return new ApiError(body.error, body.code, body.hint);
  }
}

let whenUnauthorized = () => {};

/** Sets the function to call when the API rejects the key. */
export function onUnauthorized(act: () => void): void {
  whenUnauthorized = act;
}

export function headers(): Record<string, string> {
  return { Authorization: `Bearer ${key.get() ?? ""}` };
}

/** Converts an error response into an error. */
export function refusal(status: number, text: string): ApiError {
  if (status === 401) whenUnauthorized();
  try {
    return ApiError.of(JSON.parse(text) as ErrorBody);
  } catch {
    return new ApiError(`the daemon answered with HTTP status ${status}`, "internal");
  }
}

async function send(method: string, path: string, init: RequestInit): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, { method, ...init, headers: { ...headers(), ...init.headers } });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError("the daemon cannot be reached", "unreachable");
  }
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

/** Calls the API with an optional JSON body and returns the response. */
export async function call<T>(method: string, path: string, body?: unknown): Promise<T> {
  const init: RequestInit = {};
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "Content-Type": "application/json" };
  }
  const response = await send(method, path, init);
  const text = await response.text();
  return (text ? JSON.parse(text) : undefined) as T;
}

export const get = <T>(path: string) => call<T>("GET", path);

/** The API path of a resource of a sandbox. */
export function of(sandbox: string, rest = ""): string {
  return `/sandboxes/${encodeURIComponent(sandbox)}${rest}`;
}

/** The API path of a file in a sandbox. */
export function fileOf(sandbox: string, path: string, more = ""): string {
  return of(sandbox, `/files?path=${encodeURIComponent(path)}${more}`);
}

/** Downloads a whole file. */
export async function download(sandbox: string, path: string): Promise<Blob> {
  return (await send("GET", fileOf(sandbox, path), {})).blob();
}

/** Uploads a file and reports the progress from 0 to 1. */
export function upload(sandbox: string, path: string, content: Blob, far: (part: number) => void): Promise<void> {
  // fetch reports no upload progress.
  const request = new XMLHttpRequest();
  request.open("PUT", fileOf(sandbox, path));
  for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
  request.upload.onprogress = (event) => event.lengthComputable && far(event.loaded / event.total);
  return new Promise((resolve, reject) => {
    request.onload = () => (request.status < 300 ? resolve() : reject(refusal(request.status, request.responseText)));
    request.onerror = () => reject(new ApiError("the upload was interrupted", "unreachable"));
    request.send(content);
  });
}

/** Opens a WebSocket of the API. Its URL has a ticket, so that no log shows the key. */
export async function webSocket(path: string, query: Record<string, string>): Promise<WebSocket> {
  const { ticket } = await call<{ ticket: string }>("POST", "/ws-ticket");
  const url = new URL(path, location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.search = new URLSearchParams({ ...query, ticket }).toString();
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  return socket;
}

/** Follows new events until aborted. Reconnects after a failure without missing events. */
export async function followEvents(heard: (event: BhattiEvent) => void, signal: AbortSignal): Promise<void> {
  let last = "";
  let pause = 500;
  while (!signal.aborted) {
    try {
      const accept = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
      const response = await send("GET", "/events", { headers: accept, signal });
      pause = 500;
      for await (const event of serverSent(response)) {
        last = String(event.id);
        heard(event);
      }
    } catch (error) {
      if (error instanceof ApiError && error.code === "unauthorized") return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(pause * 2, 10_000);
  }
}

async function* serverSent(response: Response): AsyncGenerator<BhattiEvent> {
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = (await reader?.read()) ?? { value: "", done: true };
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop() ?? "";
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n")) as BhattiEvent;
    }
  }
}
