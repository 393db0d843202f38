// One job: what became of it and when, live while it lives.

import { call, follow, get } from "../api.js";
import { announce, confirmed, h, notify, put } from "../dom.js";
import { count, duration, moment, unix } from "../format.js";
import * as live from "../live.js";
import { facts, progress, status } from "../parts.js";
import { shown } from "../result.js";
import { t, word } from "../words.js";

const AGAIN = ["failed", "timeout", "cancelled"];

/** Show the page until the signal says that the reader has left. */
export async function show(root, { args: [id], signal, title }) {
  let job = await get(`jobs/${encodeURIComponent(id)}`, {}, signal);
  let text = "";
  title(`${t("jobs.job")} ${job.job_id.slice(0, 8)}`);

  const heading = h("div", { class: "head" });
  const timeline = h("ol", { class: "timeline" });
  const details = h("div", {});
  const outcome = h("div", { class: "result", "aria-live": "off" });
  put(root,
    h("p", {}, h("a", { href: "#/jobs" }, `← ${t("job.back")}`)), heading,
    h("div", { class: "columns job" },
      h("section", { class: "card" }, h("header", {}, h("h2", {}, t("job.result"))), outcome),
      h("div", { class: "stack" },
        h("section", { class: "card" }, h("header", {}, h("h2", {}, t("job.timeline"))), timeline),
        h("section", { class: "card" }, h("header", {}, h("h2", {}, t("job.details"))), details))));

  const isLive = () => job.status === "queued" || job.status === "running";

  function draw() {
    const focused = document.activeElement?.dataset.act;
    put(heading,
      h("h1", {}, `${word("type", job.type)} `, h("span", { class: "mono faint" }, job.job_id.slice(0, 8))), status(job.status),
      isLive() && h("button", { class: "danger", "data-act": "cancel", onclick: cancel }, t("jobs.cancel")),
      AGAIN.includes(job.status) && h("button", { class: "primary", "data-act": "again", onclick: again }, t("job.again")));
    if (focused) heading.querySelector("[data-act]")?.focus();
    put(timeline, steps(job));
    put(details, facts([
      ["ID", h("span", { class: "mono" }, job.job_id)],
      [t("jobs.model"), job.requested_model ?? job.model], [t("jobs.region"), job.region],
      [t("job.worker"), job.worker_id], [t("job.priority"), count(job.priority)],
      [t("job.timeout"), duration(job.timeout_seconds)],
      [t("job.retry-of"), job.retry_of && h("a", { class: "mono", href: `#/jobs/${job.retry_of}` }, job.retry_of.slice(0, 8))],
    ]));
    drawOutcome();
  }

  function drawOutcome() {
    const notes = job.warnings?.length ? h("div", { class: "note" }, h("ul", {}, job.warnings.map((note) => h("li", {}, note)))) : null;
    if (job.result) put(outcome, notes, shown(job.type, job.result));
    else if (job.error) put(outcome, h("div", { class: "note bad" }, h("strong", {}, job.error.code), h("p", {}, job.error.message)), notes);
    else if (job.status === "completed") put(outcome, notes ?? h("p", { class: "faint" }, t("job.pruned")));
    else put(outcome, text ? h("div", { class: "answer" }, text) : h("p", { class: "faint" }, isLive() ? t("job.no-result") : word("status", job.status)));
  }

  async function cancel() {
    const sure = { title: t("job.sure"), text: t("job.sure-text"), yes: t("jobs.cancel"), no: t("job.keep") };
    if (!(await confirmed(sure))) return;
    try {
      await call("DELETE", `jobs/${job.job_id}`, { signal });
      job = await get(`jobs/${job.job_id}`, {}, signal);
      draw();
      announce(t("jobs.cancelled", { id: job.job_id.slice(0, 8) }));
    } catch (error) {
      if (!signal.aborted) notify(error.message, "error");
    }
  }

  async function again(event) {
    event.currentTarget.disabled = true;
    try {
      const fresh = await call("POST", `jobs/${job.job_id}/retry`, { signal });
      notify(t("job.again-done", { id: job.job_id.slice(0, 8), new: fresh.job_id.slice(0, 8) }));
      location.hash = `#/jobs/${fresh.job_id}`;
    } catch (error) {
      if (signal.aborted) return;
      notify(error.message, "error");
      draw();
    }
  }

  draw();
  const ticking = setInterval(() => {
    for (const place of timeline.querySelectorAll("[data-since]")) place.textContent = duration(Math.max(0, live.serverTime() - Number(place.dataset.since)));
  }, 1000);
  signal.addEventListener("abort", () => clearInterval(ticking));
  if (!isLive()) return;

  let scheduled = false;
  const drawSoon = () => {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      if (!signal.aborted) drawOutcome();
    });
  };
  const last = ({ event }) => event === "result" || event === "error";
  for await (const { event, data } of follow(`jobs/${job.job_id}/events`, { signal, last })) {
    if (event === "token" && (data.choice ?? 0) === 0) {
      text += data.delta;
      drawSoon();
    } else if (event === "progress") {
      job = { ...job, progress: data };
      put(timeline, steps(job));
    } else if (event === "status") {
      if (data.attempt !== job.attempt) text = "";
      job = { ...(await get(`jobs/${job.job_id}`, {}, signal)), ...(isLive() ? data : {}) };
      draw();
      announce(word("status", job.status));
    } else if (last({ event })) {
      job = data;
      draw();
      announce(word("status", job.status));
    }
  }
}

/** What happened, in its order; times between as lengths. */
function steps(job) {
  const step = (name, tone, at, ...more) => h("li", { class: tone }, h("div", { class: "step" }, h("strong", {}, name), at && h("time", { datetime: at }, moment(at))), more);
  const since = (at) => h("span", { "data-since": unix(at) }, duration(Math.max(0, live.serverTime() - unix(at))));
  const shownSteps = [step(t("job.was-accepted"), "done", job.created_at)];
  if (job.status === "queued") {
    shownSteps.push(step(word("status", "queued"), "now", null,
      h("p", { class: "faint" }, since(job.created_at), job.queue_position && ` · ${t("job.position", { n: count(job.queue_position) })}`,
        job.estimated_wait_seconds !== null && job.estimated_wait_seconds !== undefined && ` · ${t("job.wait", { time: duration(job.estimated_wait_seconds) })}`),
      job.queued_reason && h("p", {}, job.queued_reason)));
  }
  if (job.attempt > 1) shownSteps.push(step(t("job.attempt", { n: job.attempt }), "warn", null, h("p", { class: "faint" }, t("job.attempt-why"))));
  if (job.started_at) {
    shownSteps.push(step(t("job.was-begun"), "done", job.started_at,
      h("p", { class: "faint" }, `+${duration(Math.max(0, unix(job.started_at) - unix(job.created_at)))}`, job.worker_id && ` · ${t("job.by", { worker: job.worker_id })}`)));
  }
  if (job.status === "running") {
    shownSteps.push(step(word("status", "running"), "now", null, h("p", { class: "faint" }, job.started_at && since(job.started_at)),
      job.progress && progress(job.progress)));
  }
  if (job.completed_at) {
    const tone = job.status === "completed" ? "good" : job.status === "cancelled" ? "warn" : "bad";
    shownSteps.push(step(word("status", job.status), tone, job.completed_at,
      h("p", { class: "faint" }, `+${duration(Math.max(0, unix(job.completed_at) - unix(job.started_at ?? job.created_at)))}`)));
  }
  return shownSteps;
}
