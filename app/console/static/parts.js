// Parts that several pages are made of.

import { announce, h, keyed, notify } from "./dom.js";
import { count } from "./format.js";
import { t, word } from "./words.js";

const COPIED_MS = 2000;

/** A page's heading, and what can be done there. */
export const head = (title, ...tools) => h("div", { class: "head" }, h("h1", {}, title), tools);

/** A word with a colour; tone: good, warn, bad, busy or nothing. */
export const badge = (tone, text) => h("span", { class: `badge ${tone ?? ""}` }, text);

const TONES = { queued: "", running: "busy", completed: "good", failed: "bad", timeout: "bad", cancelled: "warn" };

/** A job's status. */
export const status = (value) => badge(TONES[value], word("status", value));

/** How full something is, 0 to 1; what it says stands beside it in words. */
export const meter = (part) => h("span", { class: "meter", "aria-hidden": "true" }, h("i", { style: { "--part": `${Math.min(100, 100 * part)}%` } }));

/** How far a job has come: {done, total, unit}, as the API tells it. */
export function progress({ done = 0, total = null, unit = "" }) {
  return h("div", { class: "progress" },
    h("progress", { "aria-label": t("job.progress"), ...(total ? { max: total, value: Math.min(done, total) } : {}) }),
    h("span", { class: "faint" }, `${count(done)}${total ? ` / ${count(total)}` : ""} ${word("unit", unit)}`));
}

/** A field with its label above it. */
export function field(label, control, hint) {
  const id = (control.id ||= `field-${(fields += 1)}`);
  return h("div", { class: "field" }, h("label", { for: id }, label), control, hint && h("span", { class: "faint" }, hint));
}

let fields = 0;

/** A select; options: [[value, text]]. */
export function choice(options, chosen, attributes = {}) {
  return h("select", attributes, options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
}

/**
 * A live table whose rows become cards on a phone: {node, show(items, keyOf, cells)}. The first column names the row.
 * numbers: from which column on cells are numbers. empty: what to say of no rows.
 */
export function table(caption, columns, { numbers = columns.length, empty = "" } = {}) {
  const body = h("tbody", {});
  const none = h("p", { class: "empty", hidden: true }, empty);
  const grid = h("table", { class: "cards" },
    h("caption", { class: "hidden-visually" }, caption),
    h("thead", {}, h("tr", {}, columns.map((name, index) => h("th", { scope: "col", class: index >= numbers && "number" }, name)))), body);
  const row = (cells) => h("tr", {}, cells.map((cell, index) => (index === 0
    ? h("th", { scope: "row" }, cell)
    : h("td", { "data-label": columns[index], class: index >= numbers && "number" }, cell))));
  return {
    node: h("div", { class: "scroll" }, grid, none),
    show(items, keyOf, cells) {
      keyed(body, items, keyOf, (item) => row(cells(item)));
      none.hidden = items.length > 0;
      grid.hidden = items.length === 0;
    },
  };
}

/** A form in a dialog that stays open until the server takes it; what it answered, or null. */
export function formDialog(title, verb, body, send) {
  return new Promise((resolve) => {
    const wrong = h("p", { class: "note bad", role: "alert", hidden: true });
    const submit = async (event) => {
      event.preventDefault();
      try {
        resolve(await send());
        dialog.close();
      } catch (error) {
        wrong.textContent = error.message;
        wrong.hidden = false;
      }
    };
    const dialog = h("dialog", { "aria-label": title },
      h("form", { onsubmit: submit }, h("h2", {}, title), wrong, body,
        h("div", { class: "actions" },
          h("button", { type: "button", onclick: () => dialog.close() }, t("cancel")),
          h("button", { class: "primary" }, verb))));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Facts as pairs of name and value; those without a value are left out. */
export function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/** A button that puts what `text()` gives on the clipboard. */
export function copyButton(text) {
  const press = async (event) => {
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = t("copied");
      announce(t("copied"));
    } catch (error) {
      notify(error.message, "error");
    }
    setTimeout(() => { button.textContent = t("copy"); }, COPIED_MS);
  };
  return h("button", { type: "button", onclick: press }, t("copy"));
}
