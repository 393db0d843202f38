// A host's GPUs, and the processes that hold their memory.

import { call } from "../api.js";
import { announce, confirmed, h, keyed, notify } from "../dom.js";
import { bytes, decimal, moment } from "../format.js";
import { meter, table } from "../parts.js";
import { t } from "../words.js";

const MIB = 2 ** 20;

/** {node, show(gpus), fail(message)}; base: the host's path. changed: called after a process was ended. */
export function gpuPart(base, { signal, changed }) {
  const cards = h("ul", { class: "gpus" });
  const none = h("p", { class: "empty", hidden: true }, t("hosts.no-gpus"));
  const wrong = h("p", { class: "note", hidden: true });
  const columns = ["process", "pid", "gpu", "memory", "since"].map((name) => t(`hosts.${name}`));
  const processes = table(t("hosts.processes"), [...columns, t("jobs.actions")], { empty: t("hosts.no-processes") });

  async function end(process) {
    const sure = { title: t("hosts.end-sure", { name: process.name, pid: process.pid }), text: t("hosts.end-text"), yes: t("hosts.end"), no: t("hosts.keep") };
    if (!(await confirmed(sure))) return;
    try {
      // With its start: another process may have got its number meanwhile.
      await call("DELETE", `${base}/processes/${process.pid}`, { query: { started_at: process.started_at }, signal });
      announce(t("hosts.ended", { name: process.name, pid: process.pid }));
    } catch (error) {
      if (!signal.aborted) notify(error.message, "error");
    }
    await changed();
  }

  const cells = (process) => [
    process.name, h("span", { class: "mono" }, process.pid), process.gpu,
    process.gpu_memory_usage === null ? "–" : bytes(process.gpu_memory_usage * MIB), moment(process.started_at),
    h("button", { class: "tiny danger", "aria-label": t("hosts.end-named", { name: process.name, pid: process.pid }), onclick: () => end(process) }, t("hosts.end")),
  ];

  return {
    node: [
      h("section", { class: "card" }, h("header", {}, h("h2", {}, t("hosts.gpus"))), wrong, none, cards),
      h("section", { class: "card flush" }, h("header", {}, h("h2", {}, t("hosts.processes"))), processes.node),
    ],
    show(gpus) {
      wrong.hidden = true;
      none.hidden = gpus.length > 0;
      keyed(cards, gpus, (gpu) => gpu.id, card);
      processes.show(gpus.flatMap((gpu) => gpu.processes.map((process) => ({ ...process, gpu: gpu.id }))), (process) => `${process.gpu}-${process.pid}`, cells);
    },
    fail(message) {
      wrong.textContent = message;
      wrong.hidden = false;
      none.hidden = true;
    },
  };
}

function card(gpu) {
  const gauge = (name, text, part) => h("div", { class: "gauge" },
    h("div", {}, h("span", { class: "faint" }, name), h("span", { class: "together" }, text)), part !== null && meter(part));
  const known = (value, text) => (value === null || value === undefined ? "–" : text(value));
  const part = (value, whole) => (value === null || value === undefined || !whole ? null : value / whole);
  return h("li", { class: "gpu" },
    h("h3", {}, `GPU ${gpu.id} `, h("span", { class: "faint" }, gpu.name)),
    gpu.error && h("p", { class: "note bad" }, gpu.error),
    gauge(t("hosts.memory"), known(gpu.memory_used, (used) => `${bytes(used * MIB)} / ${bytes(gpu.memory_total * MIB)}`), part(gpu.memory_used, gpu.memory_total)),
    gauge(t("hosts.utilization"), known(gpu.utilization, (value) => `${decimal(value, 0)} %`), part(gpu.utilization, 100)),
    h("div", { class: "gauge pair" },
      h("div", {}, h("span", { class: "faint" }, t("hosts.temperature")), h("span", { class: "together" }, known(gpu.temperature, (value) => `${decimal(value, 0)} °C`))),
      h("div", {}, h("span", { class: "faint" }, t("hosts.power")), h("span", { class: "together" }, known(gpu.power_draw, (value) => `${decimal(value, 0)} W`)))));
}
