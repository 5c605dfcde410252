// A terminal on the page and its connection to a session in a sandbox.

import { FitAddon } from "@xterm/addon-fit";
import { Terminal } from "@xterm/xterm";
import { ApiError, of, webSocket } from "./api";
import { terminalTheme } from "./theme";
import type { ShellMessage } from "./types";

/** After a reload, the daemon may not have noticed yet that the old page has disconnected. */
const TAKEN_RETRY_MS = 300;
const TAKEN_RETRIES = 20;
const LOST_RETRY_MS = 1000;

/** Ctrl+\ leaves the terminal, as on the command line. */
const isLeaving = (event: KeyboardEvent) => event.ctrlKey && event.key === "\\";

export class Connection {
  private readonly terminal: Terminal;
  private readonly fit = new FitAddon();
  private readonly stored: string;
  private readonly resized: ResizeObserver;
  private socket: WebSocket | undefined;
  private timer = 0;
  private retries = 0;
  private hasEnded = false;
  private hasLeft = false;

  constructor(
    private readonly sandbox: string,
    place: HTMLElement,
    private readonly tell: (status: string) => void,
  ) {
    this.stored = `bhatti-session-${sandbox}`;
    this.terminal = new Terminal({
      cursorBlink: true,
      fontFamily: "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace",
      fontSize: 14,
      scrollback: 5000,
      theme: terminalTheme(),
    });
    this.terminal.loadAddon(this.fit);
    this.terminal.open(place);
    this.fit.fit();
    this.terminal.focus();
    this.terminal.onData((text) => this.typed(new TextEncoder().encode(text)));
    this.terminal.onBinary((text) => this.typed(Uint8Array.from(text, (c) => c.charCodeAt(0))));
    this.terminal.onResize(({ rows, cols }) => this.send(JSON.stringify({ type: "resize", rows, cols })));
    this.terminal.attachCustomKeyEventHandler((event) => {
      if (!isLeaving(event)) return true;
      if (event.type === "keydown") document.querySelector<HTMLElement>('.tabs [aria-current="page"]')?.focus();
      return false;
    });
    this.resized = new ResizeObserver(() => this.fit.fit());
    this.resized.observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", this.repaint);
    document.addEventListener("themechange", this.repaint);
    void this.connect(false);
  }

  /** Closes this terminal; its session keeps running. */
  leave(): void {
    this.hasLeft = true;
    clearTimeout(this.timer);
    matchMedia("(prefers-color-scheme: dark)").removeEventListener("change", this.repaint);
    document.removeEventListener("themechange", this.repaint);
    this.resized.disconnect();
    this.socket?.close();
    this.terminal.dispose();
  }

  private readonly repaint = () => {
    this.terminal.options.theme = terminalTheme();
  };

  private async connect(isNew: boolean): Promise<void> {
    const { rows, cols } = this.terminal;
    const session = sessionStorage.getItem(this.stored);
    const query: Record<string, string> = { rows: String(rows), cols: String(cols) };
    if (isNew) query["new"] = "true";
    else if (session) query["session"] = session;
    this.hasEnded = false;
    try {
      const socket = await webSocket(of(this.sandbox, "/ws"), query);
      if (this.hasLeft) return socket.close();
      this.socket = socket;
      socket.onmessage = ({ data }) => {
        if (typeof data === "string") this.heard(JSON.parse(data) as ShellMessage);
        else this.terminal.write(new Uint8Array(data as ArrayBuffer));
      };
      socket.onclose = () => this.closed(socket);
    } catch (error) {
      // The page shows the login form.
      if (error instanceof ApiError && error.code === "unauthorized") return;
      this.tell(error instanceof Error ? error.message : String(error));
      this.later(LOST_RETRY_MS, false);
    }
  }

  private heard(message: ShellMessage): void {
    switch (message.type) {
      case "session":
        sessionStorage.setItem(this.stored, message.session_id);
        this.retries = 0;
        this.terminal.reset();
        this.fit.fit();
        this.tell(`session ${message.session_id}${message.new ? "" : ", reattached"}.`);
        break;
      case "exit":
        this.forget();
        this.hasEnded = true;
        this.tell(`The session ended with exit code ${message.exit_code}. Press Enter to open a new one.`);
        break;
      case "error":
        this.refused(message);
        break;
    }
  }

  private refused({ error, code, hint }: { error: string; code: string; hint?: string }): void {
    const known = sessionStorage.getItem(this.stored);
    this.hasEnded = true;
    if (code === "attached" && this.retries < TAKEN_RETRIES) {
      this.retries += 1;
      this.later(TAKEN_RETRY_MS, false);
    } else if (code === "not_found" && known) {
      this.forget();
      this.later(0, false);
    } else {
      this.tell(`${error}${hint ? ` (${hint})` : ""}. Press Enter to open a new session.`);
    }
  }

  private closed(socket: WebSocket): void {
    if (this.hasLeft || this.hasEnded || socket !== this.socket) return;
    this.tell("Connection lost; reconnecting…");
    this.later(LOST_RETRY_MS, false);
  }

  private later(wait: number, isNew: boolean): void {
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => void this.connect(isNew), wait);
  }

  private forget(): void {
    sessionStorage.removeItem(this.stored);
  }

  private typed(bytes: Uint8Array<ArrayBuffer>): void {
    if (this.hasEnded && bytes[0] === 13) this.later(0, true);
    // Typed text is sent as binary, so that the daemon never takes it for a message.
    else this.send(bytes);
  }

  private send(data: string | Uint8Array<ArrayBuffer>): void {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(data);
  }
}
