// GPU hosts, for admins: which there are; one host's GPUs, processes and model servers.

import { ApiError, get } from "../api.js";
import { h, put } from "../dom.js";
import { gpuPart } from "../hosts/gpus.js";
import { instancePart } from "../hosts/instances.js";
import { repeat } from "../hosts/watch.js";
import { badge, head, table } from "../parts.js";
import { t } from "../words.js";

const LIST_PAUSE_MS = 15_000;

/** Show the page until the signal says that the reader has left. */
export async function show(root, { args: [name], signal, title }) {
  const { items } = await get("hosts", {}, signal);
  if (name === undefined && items.length !== 1) {
    await showAll(root, items, signal);
    return;
  }
  const host = items.find((item) => item.name === name) ?? (name === undefined ? items[0] : null);
  if (!host) throw new ApiError(404, { detail: t("hosts.unknown", { name }) });
  title(`${t("page.hosts")}: ${host.name}`);
  await showOne(root, host, items.length > 1, signal);
}

async function showAll(root, items, signal) {
  const list = table(t("page.hosts"), ["name", "state", "address"].map((column) => t(`hosts.${column}`)), { empty: t("hosts.none") });
  const cells = (host) => [
    h("a", { href: `#/hosts/${encodeURIComponent(host.name)}` }, host.name),
    h("span", { class: "stacked" }, h("span", {}, reach(host)), host.detail && h("small", { class: "faint" }, host.detail)),
    h("span", { class: "mono" }, host.url ?? t("hosts.here")),
  ];
  put(root, head(t("page.hosts")), h("section", { class: "card flush" }, list.node));
  list.show(items, (host) => host.name, cells);
  // What was asked for just now need not be asked for again at once.
  let known = true;
  repeat(async () => {
    if (!known) list.show((await get("hosts", {}, signal).catch(() => ({ items }))).items, (host) => host.name, cells);
    known = false;
  }, signal, LIST_PAUSE_MS);
}

const reach = (host) => badge(host.reachable ? "good" : "bad", t(host.reachable ? "hosts.reachable" : "hosts.unreachable"));

async function showOne(root, host, others, signal) {
  const base = `hosts/${encodeURIComponent(host.name)}`;
  const wrong = h("div", { class: "note bad", role: "alert", hidden: true });
  const gpus = gpuPart(base, { signal, changed: () => look() });
  const instances = instancePart(base, { signal, changed: () => look() });
  const state = h("span", {}, reach(host));
  put(root,
    others && h("p", {}, h("a", { href: "#/hosts" }, `← ${t("hosts.all")}`)),
    h("div", { class: "head" }, h("h1", {}, host.name === "local" ? t("hosts.local") : host.name), host.url && h("span", { class: "mono faint" }, host.url), state),
    wrong, gpus.node, instances.node);
  let asked = false;

  async function read() {
    try {
      // A host without a driver has model servers all the same.
      const [cards, there] = await Promise.all([
        get(`${base}/gpus`, {}, signal).catch((error) => (error.status === 501 ? error : Promise.reject(error))),
        get(`${base}/models/instances`, {}, signal),
      ]);
      if (!asked) instances.supported(await get(`${base}/models/supported`, {}, signal));
      asked = true;
      wrong.hidden = true;
      put(state, reach({ reachable: true }));
      if (cards instanceof ApiError) gpus.fail(cards.message);
      else {
        gpus.show(cards);
        instances.gpus(cards);
      }
      instances.show(there);
    } catch (error) {
      if (signal.aborted) return;
      wrong.textContent = error.message;
      wrong.hidden = false;
      put(state, reach({ reachable: ![0, 502, 504].includes(error.status) }));
    }
  }

  const look = repeat(read, signal);
}
