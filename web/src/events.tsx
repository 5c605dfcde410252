import { clock } from "./format";
import type { BhattiEvent } from "./types";

/** Recent events, newest first. */
export function Events({ events }: { events: BhattiEvent[] }) {
  return (
    <main>
      <div class="bar">
        <h1>Events</h1>
      </div>
      {events.length === 0 && <p class="empty">No events yet.</p>}
      <ul class="entries events" aria-live="polite">
        {events.map((event) => (
          <li key={event.id}>
            <time dateTime={event.at}>{clock(event.at)}</time>
            <span class="type">{event.type}</span>
            <span class="grow">{event.sandbox_name}</span>
          </li>
        ))}
      </ul>
    </main>
  );
}
