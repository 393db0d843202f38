// What a model's server wrote last, and what it writes now.

import { get } from "../api.js";
import { h } from "../dom.js";
import { choice } from "../parts.js";
import { t } from "../words.js";
import { repeat } from "./watch.js";

const TAILS = ["100", "500", "2000", "10000"];
const PAUSE_MS = 2000;

/** Show the log of an instance in a dialog until it is closed. base: the host's path. */
export function readLog(base, item, signal) {
  const closing = new AbortController();
  const text = h("pre", { class: "log", tabindex: "0", "aria-label": t("hosts.log") });
  const wrong = h("p", { class: "note bad", role: "alert", hidden: true });
  const tail = choice(TAILS.map((number) => [number, t("hosts.tail", { n: number })]), TAILS[0], { "aria-label": t("hosts.lines"), onchange: () => look() });
  const follow = h("input", { type: "checkbox", checked: true, onchange: () => follow.checked && look() });
  const dialog = h("dialog", { class: "wide", "aria-labelledby": "log-title" },
    h("form", { method: "dialog" },
      h("h2", { id: "log-title" }, `${t("hosts.log")}: ${item.model_name}, GPU ${item.gpu_id}`), wrong, text,
      h("div", { class: "actions spread" },
        h("div", { class: "choices" }, tail, h("label", {}, follow, t("hosts.follow"))),
        h("button", { class: "primary", autofocus: true }, t("close")))));

  async function read() {
    if (!follow.checked && text.textContent) return;
    try {
      const { lines } = await get(`${base}/models/${encodeURIComponent(item.model_name)}/logs`, { tail: tail.value, gpu_id: item.gpu_id }, closing.signal);
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
      const told = lines.join("\n") || t("hosts.no-log");
      wrong.hidden = true;
      if (told === text.textContent) return;
      text.textContent = told;
      if (atEnd) text.scrollTop = text.scrollHeight;
    } catch (error) {
      if (closing.signal.aborted) return;
      wrong.textContent = error.message;
      wrong.hidden = false;
    }
  }

  const look = () => {
    text.textContent = "";
    return again();
  };
  signal.addEventListener("abort", () => dialog.close(), { signal: closing.signal });
  dialog.addEventListener("close", () => {
    closing.abort();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  const again = repeat(read, closing.signal, PAUSE_MS);
}
