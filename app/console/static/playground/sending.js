// Sending a job and hearing of it until its end.

import { ApiError, call, events, follow } from "../api.js";
import { notify } from "../dom.js";

const isLast = ({ event }) => event === "result" || event === "error";

/**
 * Send a job: {ended, stop}. ended resolves to the job as it was at its end, and raises ApiError if it was not taken.
 * heard({event, data}): each of its events, and {event: "job", data: id} when it is taken. leaving: "cancel" if nobody
 * wants it once the signal is aborted, else it goes on.
 */
export function send(body, { signal, heard, leaving = "keep" }) {
  let id = null;
  let unwanted = false;

  async function cancel() {
    try {
      await call("DELETE", `jobs/${id}`);
    } catch (error) {
      // It has just ended by itself.
      if (error.status !== 409) notify(error.message, "error");
    }
  }

  function onOpen(response) {
    id = response.headers.get("X-Job-Id");
    heard({ event: "job", data: id });
    if (unwanted) cancel();
  }

  async function* told() {
    let after = null;
    const query = { cancel_on_disconnect: leaving === "cancel" ? "true" : null };
    try {
      for await (const event of events("POST", "jobs/stream", { query, body, signal, onOpen })) {
        after = event.id ?? after;
        yield event;
        if (isLast(event)) return;
      }
    } catch (error) {
      // The line broke, but the job is there.
      if (id === null || signal.aborted || error instanceof ApiError) throw error;
    }
    yield* follow(`jobs/${id}/events`, { signal, last: isLast, after });
  }

  async function ended() {
    let job = null;
    for await (const event of told()) {
      heard(event);
      if (isLast(event)) job = event.data;
    }
    return job;
  }

  return {
    ended: ended(),
    stop() {
      unwanted = true;
      if (id !== null) cancel();
    },
  };
}
