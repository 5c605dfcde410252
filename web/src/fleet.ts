// The current sandboxes of the caller and their recent usage.

import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { type ApiError, followEvents, get } from "./api";
import type { BhattiEvent, Sandbox, Usage } from "./types";

/** Polling interval. Polling is needed because sandboxes are paused without an event. */
const EVERY_MS = 2000;
/** Points of a sparkline. */
const POINTS = 40;
/** Maximum number of events to show. */
const EVENTS = 200;

/** Usage of a sandbox: share of its CPUs from 0 to 1, and memory in bytes. */
export interface History {
  cpu: number[];
  memory: number[];
}

interface Seen extends History {
  at: number;
  cpuMs: number;
}

export interface Fleet {
  sandboxes: Sandbox[] | undefined;
  history: Map<string, History>;
  events: BhattiEvent[];
  trouble: ApiError | undefined;
  refresh: () => Promise<void>;
}

export function useFleet(): Fleet {
  const [sandboxes, setSandboxes] = useState<Sandbox[]>();
  const [events, setEvents] = useState<BhattiEvent[]>([]);
  const [trouble, setTrouble] = useState<ApiError>();
  const history = useRef(new Map<string, Seen>());

  const refresh = useCallback(async () => {
    try {
      const [list, usage] = await Promise.all([get<Sandbox[]>("/sandboxes"), get<Usage[]>("/usage")]);
      remember(history.current, list, usage);
      setSandboxes(list);
      setTrouble(undefined);
    } catch (error) {
      setTrouble(error as ApiError);
    }
  }, []);

  useEffect(() => {
    void refresh();
    const timer = setInterval(() => document.hidden || void refresh(), EVERY_MS);
    return () => clearInterval(timer);
  }, [refresh]);

  useEffect(() => {
    const leaving = new AbortController();
    get<BhattiEvent[]>("/events?limit=50").then(
      (before) => setEvents((now) => [...now, ...before.reverse()].slice(0, EVENTS)),
      () => {},
    );
    const heard = (event: BhattiEvent) => {
      setEvents((before) => [event, ...before].slice(0, EVENTS));
      void refresh();
    };
    void followEvents(heard, leaving.signal);
    return () => leaving.abort();
  }, [refresh]);

  return { sandboxes, history: history.current, events, trouble, refresh };
}

function remember(history: Map<string, Seen>, sandboxes: Sandbox[], usage: Usage[]): void {
  const now = performance.now();
  const used = new Map(usage.map((one) => [one.sandbox_id, one]));
  for (const id of history.keys()) {
    if (!sandboxes.some((sandbox) => sandbox.id === id)) history.delete(id);
  }
  for (const { id, cpus } of sandboxes) {
    const before = history.get(id);
    const one = used.get(id);
    const cpuMs = one?.cpu_ms ?? 0;
    const passed = before ? now - before.at : 0;
    // A new VM counts from zero.
    const cpu = before && passed > 0 ? Math.max(0, cpuMs - before.cpuMs) / passed / cpus : 0;
    history.set(id, {
      at: now,
      cpuMs,
      cpu: [...(before?.cpu ?? []), Math.min(1, cpu)].slice(-POINTS),
      memory: [...(before?.memory ?? []), one?.memory_bytes ?? 0].slice(-POINTS),
    });
  }
}
