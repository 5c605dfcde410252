// The console: one page that uses only the public API.

import "@xterm/xterm/css/xterm.css";
import "./style.css";
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { key, onUnauthorized } from "./api";
import { Events } from "./events";
import { useFleet } from "./fleet";
import { List } from "./list";
import { Login } from "./login";
import { styleWithinPolicy } from "./policy";
import { SandboxView, TABS, type Tab } from "./sandbox";
import { applyTheme, toggleTheme } from "./theme";

function App() {
  const [isIn, setIn] = useState(key.get() !== null);
  const leave = () => {
    key.forget();
    setIn(false);
  };
  useEffect(() => onUnauthorized(leave), []);
  return isIn ? <Console leave={leave} /> : <Login done={() => setIn(true)} />;
}

function Console({ leave }: { leave: () => void }) {
  const fleet = useFleet();
  const [place, part] = useRoute();
  return (
    <>
      <header>
        <a href="#/" class="brand">
          bhatti
        </a>
        <nav aria-label="Console">
          <a href="#/" aria-current={place !== "events" ? "page" : undefined}>
            Sandboxes
          </a>
          <a href="#/events" aria-current={place === "events" ? "page" : undefined}>
            Events
          </a>
        </nav>
        <button class="small" onClick={toggleTheme}>
          Dark / light
        </button>
        <button class="small" onClick={leave}>
          Log out
        </button>
      </header>
      <Page place={place} part={part} fleet={fleet} />
    </>
  );
}

function Page({ place, part, fleet }: { place: string; part: string; fleet: ReturnType<typeof useFleet> }) {
  if (place === "events") return <Events events={fleet.events} />;
  if (!place) return <List fleet={fleet} />;
  const sandbox = fleet.sandboxes?.find((one) => one.id === place);
  if (sandbox) {
    const tab = TABS.find((name) => name === part) ?? "terminal";
    return <SandboxView sandbox={sandbox} tab={tab satisfies Tab} fleet={fleet} />;
  }
  return <main>{fleet.sandboxes && <p class="empty">This sandbox no longer exists.</p>}</main>;
}

/** The location's hash, `#/PLACE/PART`. */
function useRoute(): [string, string] {
  const read = (): [string, string] => {
    const [, place = "", part = ""] = location.hash.split("/");
    return [place, part];
  };
  const [route, setRoute] = useState(read);
  useEffect(() => {
    const changed = () => setRoute(read());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

styleWithinPolicy();
applyTheme();
const place = document.getElementById("app");
if (place) render(<App />, place);
