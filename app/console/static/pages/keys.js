// API keys, for admins: make, change, rotate, revoke.

import { call, get, key as usedKey } from "../api.js";
import { confirmed, h, notify, put } from "../dom.js";
import { count, moment } from "../format.js";
import { badge, copyButton, field, formDialog, head, table } from "../parts.js";
import { t } from "../words.js";

const SCOPES = ["infer", "read", "admin", "worker"];
const TONES = { open: "good", expired: "warn", revoked: "bad" };
const QUOTAS = ["jobs_per_day", "jobs_per_month", "tokens_per_day", "tokens_per_month", "gpu_seconds_per_day", "gpu_seconds_per_month"];

/** Show the page until the signal says that the reader has left. */
export async function show(root, { signal }) {
  const columns = ["name", "scopes", "state", "weight", "quotas", "created", "actions"].map((name) => t(name === "actions" ? "jobs.actions" : `keys.${name}`));
  const list = table(t("page.keys"), columns, { empty: t("keys.empty") });
  put(root,
    head(t("page.keys"), h("button", { class: "primary", onclick: create }, t("keys.create"))),
    h("section", { class: "card flush" }, list.node));

  async function load() {
    const { items } = await get("keys", {}, signal);
    list.show([...items].reverse(), (item) => item.id, cells);
  }

  function cells(item) {
    const open = item.state === "open";
    return [
      h("span", { class: "stacked" }, item.name, h("small", { class: "mono faint" }, `gpi_${item.id}`)),
      item.scopes.join(", "),
      [badge(TONES[item.state], t(`keys.${item.state}`)), item.expires_at && open && h("small", { class: "faint" }, ` ${t("keys.until", { time: moment(item.expires_at) })}`)],
      count(item.weight),
      limits(item.quotas),
      moment(item.created_at),
      h("span", { class: "actions" },
        open && h("button", { class: "tiny", "aria-label": `${t("keys.edit")}: ${item.name}`, onclick: () => change(item) }, t("keys.edit")),
        open && h("button", { class: "tiny", "aria-label": `${t("keys.rotate")}: ${item.name}`, onclick: () => rotate(item) }, t("keys.rotate")),
        open && h("button", { class: "tiny danger", "aria-label": `${t("keys.revoke")}: ${item.name}`, onclick: () => revoke(item) }, t("keys.revoke"))),
    ];
  }

  /** Do it, say what is wrong with it, show the keys as they are then. What was made, or null. */
  async function attempt(act) {
    try {
      const made = await act();
      await load();
      return made;
    } catch (error) {
      if (!signal.aborted) notify(error.message, "error");
      return null;
    }
  }

  async function create() {
    const name = h("input", { name: "name", required: true, maxlength: 128, autocomplete: "off" });
    const days = h("input", { name: "days", type: "number", min: 1, max: 36500, placeholder: t("keys.never") });
    const weight = weightInput(1);
    const boxes = SCOPES.map((scope) => h("input", { type: "checkbox", value: scope, checked: scope === "infer" || scope === "read" }));
    const quotas = quotaInputs({});
    const body = [
      field(t("keys.name"), name),
      h("fieldset", {}, h("legend", {}, t("keys.scopes")),
        h("div", { class: "choices" }, boxes.map((box, index) => h("label", {}, box, SCOPES[index])))),
      h("div", { class: "fields" }, field(t("keys.expires"), days), field(t("keys.weight"), weight)),
      quotas.node,
    ];
    const sent = () => ({
      name: name.value, scopes: boxes.filter((box) => box.checked).map((box) => box.value),
      expires_days: days.value ? Number(days.value) : null, weight: Number(weight.value), quotas: quotas.values(),
    });
    const made = await ask(t("keys.create"), t("keys.create"), body, () => call("POST", "keys", { body: sent(), signal }));
    if (made) await tell(made);
  }

  async function change(item) {
    const name = h("input", { name: "name", required: true, maxlength: 128, autocomplete: "off", value: item.name });
    const weight = weightInput(item.weight);
    const quotas = quotaInputs(item.quotas);
    const sent = () => ({ name: name.value, weight: Number(weight.value), quotas: quotas.values() });
    await ask(`${t("keys.edit")}: ${item.name}`, t("keys.save"), [field(t("keys.name"), name), field(t("keys.weight"), weight, t("keys.weight-why")), quotas.node],
      () => call("PATCH", `keys/${item.id}`, { body: sent(), signal }));
  }

  async function rotate(item) {
    const sure = { title: t("keys.rotate-sure", { name: item.name }), text: t("keys.rotate-text"), yes: t("keys.rotate"), no: t("cancel") };
    if (!(await confirmed(sure))) return;
    const made = await attempt(() => call("POST", `keys/${item.id}/rotate`, { body: {}, signal }));
    if (made) await tell(made);
  }

  async function revoke(item) {
    const own = usedKey()?.startsWith(`gpi_${item.id}_`);
    const text = own ? t("keys.revoke-own") : t("keys.revoke-text");
    if (!(await confirmed({ title: t("keys.revoke-sure", { name: item.name }), text, yes: t("keys.revoke"), no: t("keys.keep") }))) return;
    await attempt(() => call("DELETE", `keys/${item.id}`, { signal }));
  }

  /** What the server answered to a form, or null; the keys are shown as they are then. */
  async function ask(title, verb, body, send) {
    const made = await formDialog(title, verb, body, send);
    if (made) await load();
    return made;
  }

  /** Show a new key's text, this once. */
  function tell(made) {
    return new Promise((resolve) => {
      const dialog = h("dialog", { "aria-labelledby": "fresh-title" },
        h("form", { method: "dialog" },
          h("h2", { id: "fresh-title" }, `${t("keys.fresh")}: ${made.name}`),
          h("p", { class: "note" }, t("keys.text")),
          h("pre", { class: "secret", tabindex: "0" }, made.key),
          h("div", { class: "actions" }, copyButton(() => made.key), h("button", { class: "primary" }, t("close")))));
      dialog.addEventListener("close", () => {
        dialog.remove();
        resolve();
      });
      document.body.append(dialog);
      dialog.showModal();
    });
  }

  await load();
}

const weightInput = (value) => h("input", { type: "number", min: 1, max: 1000, required: true, value });

function limits(quotas) {
  const set = QUOTAS.filter((name) => quotas?.[name] !== null && quotas?.[name] !== undefined);
  return set.length ? h("span", { class: "stacked" }, set.map((name) => h("small", {}, `${t(`quota.${name}`)}: ${count(quotas[name])}`))) : t("keys.no-limit");
}

function quotaInputs(quotas) {
  const inputs = QUOTAS.map((name) => h("input", { type: "number", min: 0, placeholder: t("keys.no-limit"), value: quotas?.[name] ?? "" }));
  return {
    node: h("fieldset", {}, h("legend", {}, t("keys.quotas")), h("div", { class: "fields" }, QUOTAS.map((name, index) => field(t(`quota.${name}`), inputs[index])))),
    values: () => Object.fromEntries(QUOTAS.map((name, index) => [name, inputs[index].value === "" ? null : Number(inputs[index].value)])),
  };
}
