// The caller's jobs, newest first (everybody's for an admin), by filters that stand in the address.

import { call, get } from "../api.js";
import { announce, h, keyed, notify, put } from "../dom.js";
import { duration, moment, short, unix } from "../format.js";
import * as live from "../live.js";
import { choice, field, head, status } from "../parts.js";
import { t, word } from "../words.js";

const PER_PAGE = 50;
// The list is read anew at most this often, however many jobs come and go.
const REFRESH_MS = 1000;
const SPANS_S = { hour: 3600, day: 86_400, week: 604_800 };

/** Show the page until the signal says that the reader has left. */
export async function show(root, { query, signal, session }) {
  let items = [];
  let next = null;
  const body = h("tbody", {});
  const empty = h("p", { class: "empty", hidden: true }, t("jobs.empty"));
  const more = h("div", { class: "more", hidden: true }, h("button", { onclick: () => older() }, t("jobs.more")));
  const columns = ["job", "status", "type", "model", "region", "accepted", "took"].map((name) => t(`jobs.${name}`));
  put(root,
    head(t("page.jobs")),
    h("form", { class: "card fields", role: "search", onsubmit: (event) => event.preventDefault() },
      filter("status", session.states.map((state) => [state, word("status", state)])),
      filter("type", session.types.map((type) => [type, word("type", type)])),
      filter("region", session.regions.map((region) => [region, region])),
      filter("since", Object.keys(SPANS_S).map((span) => [span, t(`jobs.${span}`)]))),
    h("section", { class: "card flush", "aria-label": t("page.jobs") },
      h("div", { class: "scroll" },
        h("table", { class: "cards" }, h("caption", { class: "hidden-visually" }, t("page.jobs")),
          h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)), h("th", { scope: "col" }, h("span", { class: "hidden-visually" }, t("jobs.actions"))))),
          body)),
      empty, more));

  function filter(name, options) {
    const change = (event) => {
      query.set(name, event.target.value);
      if (!event.target.value) query.delete(name);
      history.replaceState(null, "", `#/jobs${query.size ? `?${query}` : ""}`);
      items = [];
      load();
    };
    return field(t(`jobs.${name}`), choice([["", t("jobs.any")], ...options], query.get(name) ?? "", { onchange: change }));
  }

  function wanted() {
    const span = SPANS_S[query.get("since")];
    return {
      status: query.get("status"), type: query.get("type"), region: query.get("region"),
      created_after: span && new Date(1000 * (live.serverTime() - span)).toISOString(),
    };
  }

  function draw() {
    keyed(body, items, (job) => job.job_id, row);
    empty.hidden = items.length > 0;
    body.parentElement.hidden = items.length === 0;
    more.hidden = next === null;
  }

  function row(job) {
    const cells = [
      [status(job.status)], word("type", job.type), job.requested_model ?? job.model ?? "–", job.region,
      moment(job.created_at), took(job),
    ];
    const live = job.status === "queued" || job.status === "running";
    const label = t("jobs.cancel-named", { id: short(job.job_id) });
    return h("tr", {},
      h("th", { scope: "row" }, h("a", { class: "mono", href: `#/jobs/${job.job_id}` }, short(job.job_id))),
      cells.map((cell, index) => h("td", { "data-label": columns[index + 1] }, cell)),
      h("td", { class: "actions-cell" }, live && h("button", { class: "tiny", "aria-label": label, onclick: () => cancel(job) }, t("jobs.cancel"))));
  }

  async function cancel(job) {
    try {
      await call("DELETE", `jobs/${job.job_id}`, { signal });
      announce(t("jobs.cancelled", { id: short(job.job_id) }));
    } catch (error) {
      if (!signal.aborted) notify(error.message, "error");
    }
    await load();
    body.querySelector(`a[href$="${job.job_id}"]`)?.focus();
  }

  let asked = 0;

  /** The first page anew; what was shown of older pages stays. */
  async function load() {
    const mine = (asked += 1);
    const page = await get("jobs", { ...wanted(), limit: PER_PAGE }, signal);
    if (mine !== asked) return;
    const known = new Set(page.items.map((job) => job.job_id));
    const last = page.items.at(-1);
    const older = last && page.next_cursor ? items.filter((job) => !known.has(job.job_id) && job.created_at <= last.created_at) : [];
    if (older.length === 0) next = page.next_cursor;
    items = [...page.items, ...older];
    draw();
  }

  async function older() {
    const page = await get("jobs", { ...wanted(), limit: PER_PAGE, cursor: next }, signal);
    const known = new Set(items.map((job) => job.job_id));
    items = [...items, ...page.items.filter((job) => !known.has(job.job_id))];
    next = page.next_cursor;
    draw();
  }

  await load();
  let due = null;
  const refresh = async () => {
    try {
      await load();
    } catch (error) {
      if (!signal.aborted) notify(error.message, "error");
    }
    due = null;
  };
  live.watch((_, changed) => {
    if (changed.includes("pulse") || changed.includes("totals")) due ??= setTimeout(refresh, REFRESH_MS);
  }, signal);
  signal.addEventListener("abort", () => clearTimeout(due));
}

function took(job) {
  if (!job.completed_at) return "–";
  return duration(unix(job.completed_at) - unix(job.created_at));
}
