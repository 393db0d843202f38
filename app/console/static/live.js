// The one event stream of the console: what the platform looks like now, kept up to date for all pages.

import { follow } from "./api.js";

const listeners = new Set();
let state = null;
let connected = null;
let ending = null;
let offset = 0;

/** What is known, by section: totals, regions, queues, workers, pulse; null before the first snapshot. */
export const now = () => state;

/** Unix seconds by the server's clock, so that waits are right whatever this one says. */
export const serverTime = () => Date.now() / 1000 + offset;

/** Call `listener(state, changedSections, connected)` now, if something is known, and with every change. */
export function watch(listener, signal) {
  listeners.add(listener);
  signal.addEventListener("abort", () => listeners.delete(listener));
  if (state) listener(state, Object.keys(state), connected);
}

/** Begin, or begin anew with another key. A hidden page holds no stream: each costs the server a thread. */
export function start() {
  stop();
  document.onvisibilitychange = () => (document.hidden ? stop() : listen());
  if (!document.hidden) listen();
}

function stop() {
  ending?.abort();
  ending = null;
}

async function listen() {
  stop();
  const mine = (ending = new AbortController());
  const onState = (open) => {
    if (open === connected) return;
    connected = open;
    tell([]);
  };
  try {
    for await (const { event, data } of follow("console/events", { signal: mine.signal, onState })) {
      if (event !== "snapshot" && event !== "change") continue;
      offset = data.at - Date.now() / 1000;
      const { at, ...sections } = data;
      state = event === "snapshot" ? sections : { ...state, ...sections };
      tell(Object.keys(sections));
    }
  } catch {
    onState(false);
  }
}

function tell(changed) {
  for (const listener of listeners) if (state) listener(state, changed, connected);
}
