// What the platform does now, and did in the last hour.

import { get } from "../api.js";
import { chart } from "../chart.js";
import { h, put } from "../dom.js";
import { count, decimal, duration, gib } from "../format.js";
import * as live from "../live.js";
import { map } from "../map.js";
import { badge, head, meter, table } from "../parts.js";
import { t, word } from "../words.js";

const HISTORY_MS = 20_000;
const TICK_MS = 1000;
const FIGURES = ["queued", "running", "workers", "slots", "oldest"];

/** Show the page until the signal says that the reader has left. */
export async function show(root, { signal }) {
  const figures = Object.fromEntries(FIGURES.map((name) => [name, h("dd", {}, "–")]));
  const world = h("div", { class: "map-box" });
  const regions = table(t("overview.map"), ["region", "workers-column", "slots", "queued", "running"].map((name) => t(`overview.${name}`)), { numbers: 1 });
  const queues = table(t("overview.queues"), ["region", "type", "queued", "running", "oldest"].map((name) => t(`overview.${name}`)), { numbers: 2, empty: t("overview.no-queues") });
  const workers = table(t("overview.worker-list"), ["worker", "region", "state", "type", "slots", "memory", "reliability"].map((name) => t(`overview.${name}`)), { empty: t("overview.no-workers") });
  const states = h("p", { class: "faint" });
  const history = h("section", { class: "columns three", "aria-label": t("overview.hour") });
  put(root,
    head(t("page.overview")),
    h("dl", { class: "figures" }, FIGURES.map((name) => h("div", { class: "figure" }, h("dt", {}, t(`overview.${name}`)), figures[name]))),
    history,
    h("div", { class: "columns" },
      h("section", { class: "card flush" }, h("header", {}, h("h2", {}, t("overview.map"))), world, regions.node),
      h("section", { class: "card flush" }, h("header", {}, h("h2", {}, t("overview.queues"))), queues.node)),
    h("section", { class: "card flush" }, h("header", {}, h("h2", {}, t("overview.worker-list")), states), workers.node));

  const draw = (state, changed) => {
    const { totals } = state;
    if (changed.includes("totals")) {
      for (const name of ["queued", "running", "workers"]) figures[name].textContent = count(totals[name]);
      put(figures.slots, count(totals.used), " ", h("small", {}, t("overview.of", { n: count(totals.slots) })));
    }
    if (changed.includes("regions")) {
      put(world, map(state.regions));
      regions.show(state.regions, (region) => region.name, (region) => [
        region.reachable ? region.name : [region.name, " ", badge("bad", t("overview.unreachable"))],
        count(region.workers), slots(region.used, region.slots), count(region.queued), count(region.running)]);
    }
    if (changed.includes("queues")) drawQueues(state);
    if (changed.includes("workers")) {
      states.textContent = Object.entries(state.workers.by_state).map(([name, number]) => `${count(number)} ${word("state", name)}`).join(", ");
      if (state.workers.items === null) put(workers.node, h("p", { class: "empty" }, t("overview.workers-hidden")));
      else workers.show(state.workers.items, (worker) => worker.worker_id ?? worker.name, workerCells);
    }
  };
  const drawQueues = (state) => queues.show(state.queues, (queue) => `${queue.region}.${queue.type}`, (queue) => [
    queue.region, word("type", queue.type), count(queue.queued), count(queue.running),
    h("span", { "data-since": queue.oldest_at ?? false }, age(queue.oldest_at))]);
  const tick = () => {
    figures.oldest.textContent = age(live.now()?.totals.oldest_at);
    for (const place of root.querySelectorAll("[data-since]")) place.textContent = age(Number(place.dataset.since));
  };
  live.watch((state, changed) => {
    draw(state, changed);
    tick();
  }, signal);
  const ticking = setInterval(tick, TICK_MS);

  let asking = false;
  const remember = async () => {
    if (asking || document.hidden) return;
    asking = true;
    try {
      drawHistory(history, await get("console/history", {}, signal));
    } catch (error) {
      if (!signal.aborted && !history.hasChildNodes()) put(history, h("p", { class: "card" }, error.message));
    } finally {
      asking = false;
    }
  };
  const remembering = setInterval(remember, HISTORY_MS);
  signal.addEventListener("abort", () => {
    clearInterval(ticking);
    clearInterval(remembering);
  });
  await remember();
}

const age = (since) => (since ? duration(Math.max(0, live.serverTime() - since)) : "–");

function slots(used, total) {
  return h("span", { class: "together" }, meter(total ? used / total : 0), ` ${count(used)} / ${count(total)}`);
}

function workerCells(worker) {
  const tones = { ready: "good", loading: "busy", draining: "warn", off_duty: "warn", lost: "bad" };
  return [
    [h("span", { class: "stacked" }, worker.name, h("small", { class: "faint" }, worker.gpu_name ?? worker.device))],
    worker.region,
    badge(tones[worker.state], word("state", worker.state)),
    worker.types.map((type) => word("type", type)).join(", "),
    slots(worker.slots.used, worker.slots.total),
    gib(worker.gpu_memory),
    `${decimal(100 * worker.reliability_score, 1)} %`,
  ];
}

const seconds = (value) => t("time.s", { n: decimal(value, 2) });

function drawHistory(place, { minutes, own }) {
  const points = minutes.map((minute) => {
    const told = minute.completed + minute.otherwise;
    const completed = told ? (minute.ended * minute.completed) / told : 0;
    return { ...minute, completed, otherwise: minute.ended - completed };
  });
  const times = (part) => [
    { name: `${part}_p50_s`, label: "p50", kind: "line", tone: "accent" },
    { name: `${part}_p95_s`, label: "p95", kind: "line", tone: "second" },
  ];
  const boxes = [
    ["throughput", [{ name: "completed", label: t("status.completed"), kind: "bar", tone: "accent" }, { name: "otherwise", label: t("overview.others"), kind: "bar", tone: "bad" }], (value) => decimal(value, 1)],
    ["latency", times("whole"), duration, seconds],
    ["queue-time", times("queue"), duration, seconds],
  ];
  // Whoever reads a table keeps it open while the numbers change.
  const open = [...place.querySelectorAll("details")].map((details) => details.open);
  put(place, boxes.map(([name, series, shown, tick], index) => {
    const drawn = chart({ title: t(`overview.${name}`), points, series, show: shown, tick });
    if (open[index]) drawn.querySelector("details").open = true;
    return h("section", { class: "card" },
      h("header", {}, h("h2", {}, t(`overview.${name}`)), h("span", { class: "faint" }, t(own ? "overview.own" : "overview.hour"))), drawn);
  }));
}
