// The API's types, as far as the console reads them. docs/openapi.json has all of them.

export interface Sandbox {
  id: string;
  name: string;
  isolation: "vm" | "container";
  status: "creating" | "running" | "stopped" | "failed" | "destroyed";
  thermal?: "hot" | "warm" | "cold";
  reason?: string;
  cpus: number;
  memory_mb: number;
  image: string;
  network: string;
  ip?: string;
  labels: Record<string, string>;
  keep_hot: boolean;
  origin: string;
  created_at: string;
  expires_at?: string;
}

export interface Usage {
  sandbox_id: string;
  cpu_ms: number;
  memory_bytes: number;
}

export interface FileEntry {
  name: string;
  size: number;
  mode: string;
  is_dir: boolean;
  mtime: number;
  symlink_target?: string;
}

export interface Port {
  container_port: number;
}

export interface Publication {
  alias: string;
  port: number;
  urls?: string[];
}

export interface BhattiEvent {
  id: number;
  at: string;
  type: string;
  sandbox_id?: string;
  sandbox_name?: string;
  detail: unknown;
}

export interface Named {
  name: string;
}

export interface ErrorBody {
  error: string;
  code: string;
  hint?: string;
}

export type ShellMessage =
  | { type: "session"; session_id: string; new: boolean }
  | { type: "exit"; exit_code: number }
  | ({ type: "error" } & ErrorBody);
