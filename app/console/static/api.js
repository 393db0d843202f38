// Talking to the API: JSON, problems, server-sent events by fetch (EventSource cannot send a key).

const BASE = new URL("../api/v1/", import.meta.url);
const KEY = "console.key";
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
const READ_AGAIN_MS = [200, 1000];

let askForKey = null;
let asking = null;

/** A request that was not answered as asked: status, code, detail, errors by field. status 0: no answer at all. */
export class ApiError extends Error {
  constructor(status, problem) {
    const inner = problem.error ?? problem;
    super(inner.detail ?? inner.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = inner.code ?? "";
    this.errors = inner.errors ?? {};
    this.problem = problem;
  }
}

/** What to call when a key is needed: gets the ApiError, resolves to a key. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** The key in use, or null. */
export const key = () => sessionStorage.getItem(KEY);

/** Use this key for the rest of the browser session; null forgets it. */
export function useKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

/**
 * A Response, ok or raised as ApiError. path: under /api/v1 (or absolute, "/v1/models"). body: an object is sent as
 * JSON, FormData and Blob as they are.
 */
export async function send(method, path, { query, body, signal, headers } = {}) {
  const url = path.startsWith("/") ? new URL(`..${path}`, import.meta.url) : new URL(path, BASE);
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== null && value !== undefined && value !== "") url.searchParams.set(name, value);
  }
  const isData = body instanceof FormData || body instanceof Blob;
  const again = method === "GET" ? [...READ_AGAIN_MS] : [];
  while (true) {
    const used = key();
    const sent = { ...headers };
    if (used) sent.Authorization = `Bearer ${used}`;
    if (body !== undefined && !isData) sent["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(url, {
        method, headers: sent, signal, cache: "no-store",
        body: body === undefined || isData ? body : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (!again.length) throw new ApiError(0, { detail: error.message });
      // The browser's network has changed, say; reading changes nothing.
      await passed(again.shift());
      continue;
    }
    if (response.ok) return response;
    const error = new ApiError(response.status, await response.json().catch(() => ({})));
    if (response.status !== 401 || !askForKey) throw error;
    // Somebody else may have signed in meanwhile.
    if (key() === used) {
      asking ??= askForKey(error).then(useKey).finally(() => { asking = null; });
      await asking;
    }
  }
}

/** The JSON of an answer; null of one without a body. */
export async function call(method, path, options) {
  const response = await send(method, path, options);
  return response.status === 204 ? null : response.json();
}

/** GET as JSON. */
export const get = (path, query, signal) => call("GET", path, { query, signal });

/**
 * The events of one answer, as {id, event, data}: data is parsed JSON, or text that is none ("[DONE]").
 * onOpen: told the Response before its first event.
 */
export async function* events(method, path, { onOpen = () => {}, ...options } = {}) {
  const response = await send(method, path, options);
  onOpen(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parsed(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  const event = { id: null, event: "message", data: null };
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "data") data.push(value);
    else if (field === "event") event.event = value;
    else if (field === "id") event.id = value;
  }
  if (data.length === 0) return null;
  try {
    event.data = JSON.parse(data.join("\n"));
  } catch {
    event.data = data.join("\n");
  }
  return event;
}

const passed = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/**
 * The events of a stream that is opened again, from where it broke, until `last(event)` or the signal says so.
 * onState: told true when it is open, false when it broke. after: the id of the last event that is known.
 */
export async function* follow(path, { signal, last = () => false, onState = () => {}, after = null } = {}) {
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    try {
      for await (const event of events("GET", path, { signal, headers: after ? { "Last-Event-ID": after } : {} })) {
        onState(true);
        pause = FIRST_PAUSE_MS;
        after = event.id ?? after;
        yield event;
        if (last(event)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof ApiError) && !(error instanceof TypeError)) throw error;
      // The request itself is wrong: asking again would not help.
      if (error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
    }
    onState(false);
    await passed(pause);
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  }
}
