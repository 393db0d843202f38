// The model servers of a host: what runs, and starting, stopping and reading it.

import { call } from "../api.js";
import { announce, confirmed, h, notify } from "../dom.js";
import { bytes, gib, moment } from "../format.js";
import { badge, choice, field, formDialog, table } from "../parts.js";
import { t, word } from "../words.js";
import { readLog } from "./log.js";

const TONES = { RUNNING: "good", STARTING: "busy", STOPPING: "busy", ERROR: "bad", STOPPED: "" };
const MIB = 2 ** 20;

/**
 * {node, show(instances), supported(models), gpus(gpus)}; base: the host's path. changed: called after an order.
 */
export function instancePart(base, { signal, changed }) {
  let known = [];
  let models = [];
  let gpuIds = [0];
  const busy = new Set();
  const columns = ["model", "runner", "gpu", "state", "memory", "port", "since"].map((name) => t(`hosts.${name}`));
  const list = table(t("hosts.instances"), [...columns, t("jobs.actions")], { empty: t("hosts.no-instances") });
  const startable = table(t("hosts.supported"), ["model", "runner", "copies", "needs"].map((name) => t(`hosts.${name}`)), { empty: t("hosts.no-supported") });
  const keyOf = (item) => `${item.model_name}@${item.gpu_id}`;
  const start = h("button", { class: "primary", disabled: true, onclick: order }, t("hosts.start"));

  function draw() {
    list.show(known.map((item) => ({ ...item, busy: busy.has(keyOf(item)) })), keyOf, cells);
  }

  function cells(item) {
    const named = (verb) => `${verb}: ${item.model_name}, GPU ${item.gpu_id}`;
    return [
      item.model_name, item.model_type, (item.gpu_ids ?? [item.gpu_id]).join(", "),
      h("span", { class: "stacked" }, h("span", {}, badge(TONES[item.status], word("instance", item.status))), item.reason && h("small", { class: "faint" }, item.reason)),
      item.gpu_memory_mib === null || item.gpu_memory_mib === undefined ? gib(item.memory_gib) : bytes(item.gpu_memory_mib * MIB),
      item.port ?? "–", moment(item.since),
      h("span", { class: "actions" },
        h("button", { class: "tiny", "aria-label": named(t("hosts.log")), onclick: () => readLog(base, item, signal) }, t("hosts.log")),
        h("button", { class: "tiny danger", "aria-label": named(t("hosts.stop")), disabled: item.busy, onclick: () => stop(item) }, t(item.busy ? "hosts.stopping" : "hosts.stop"))),
    ];
  }

  async function stop(item) {
    const name = item.model_name;
    const sure = { title: t("hosts.stop-sure", { name, gpu: item.gpu_id }), text: t("hosts.stop-text"), yes: t("hosts.stop"), no: t("hosts.keep") };
    if (!(await confirmed(sure))) return;
    busy.add(keyOf(item));
    draw();
    try {
      await call("POST", `${base}/models/stop`, { body: { model_name: name, gpu_id: item.gpu_id }, signal });
      announce(t("hosts.stopped", { name }));
    } catch (error) {
      if (!signal.aborted) notify(error.message, "error");
    }
    busy.delete(keyOf(item));
    await changed();
  }

  async function order() {
    const model = choice(models.map((one) => [one.model_name, `${one.model_name} (${one.model_type})`]), models[0]?.model_name);
    const gpu = choice(gpuIds.map((id) => [String(id), `GPU ${id}`]), String(gpuIds[0]));
    const config = h("textarea", { rows: 3, class: "mono", placeholder: "{}", spellcheck: "false" });
    const force = h("input", { type: "checkbox" });
    const body = [
      h("div", { class: "fields" }, field(t("hosts.model"), model), field(t("hosts.gpu"), gpu)),
      field(t("hosts.config"), config, t("hosts.config-why")),
      h("div", { class: "choices" }, h("label", {}, force, t("hosts.force"))),
    ];
    const sent = () => ({ model_name: model.value, gpu_id: Number(gpu.value), config: JSON.parse(config.value.trim() || "{}"), force: force.checked });
    const made = await formDialog(t("hosts.start"), t("hosts.start"), body, () => call("POST", `${base}/models/start`, { body: sent(), signal }));
    if (!made) return;
    announce(t("hosts.starting", { name: made.model_name }));
    await changed();
  }

  return {
    node: [
      h("section", { class: "card flush" }, h("header", {}, h("h2", {}, t("hosts.instances")), start), list.node),
      h("section", { class: "card flush" }, h("header", {}, h("h2", {}, t("hosts.supported"))), startable.node),
    ],
    show(instances) {
      known = instances;
      draw();
    },
    supported(all) {
      models = all;
      start.disabled = all.length === 0;
      startable.show(all, (one) => one.model_name, (one) => [one.model_name, one.model_type, one.instances_per_gpu, gib(one.memory_gib)]);
    },
    gpus(gpus) {
      if (gpus.length) gpuIds = gpus.map((gpu) => gpu.id);
    },
  };
}
