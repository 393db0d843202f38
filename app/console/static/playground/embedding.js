// Comparing sentences by the cosine of their vectors.

import { h, put } from "../dom.js";
import { count } from "../format.js";
import { choice, facts } from "../parts.js";
import { t } from "../words.js";
import { desk } from "./desk.js";
import { form as newForm, lines } from "./form.js";

/** Show the page; options: {models, session}. */
export function show(root, page) {
  const form = newForm();
  const list = h("div", { class: "sentences" });
  const texts = () => [...list.querySelectorAll("textarea")].map((control) => control.value.trim()).filter(Boolean);

  function add(focus = true) {
    const control = lines({ rows: 2 });
    const label = h("label", {});
    const remove = h("button", { type: "button", class: "tiny", onclick: () => {
      row.remove();
      number();
      table.changed();
      list.querySelector("textarea")?.focus();
    } }, t("playground.remove"));
    const row = h("div", { class: "sentence" }, h("div", { class: "sentence-head" }, label, remove), control);
    list.append(row);
    number();
    if (focus) control.focus();
  }

  function number() {
    [...list.children].forEach((row, at) => {
      const control = row.querySelector("textarea");
      control.id = `sentence-${at + 1}`;
      row.querySelector("label").htmlFor = control.id;
      row.querySelector("label").textContent = t("playground.sentence", { n: at + 1 });
      const remove = row.querySelector("button");
      remove.setAttribute("aria-label", `${t("playground.remove")}: ${t("playground.sentence", { n: at + 1 })}`);
      remove.hidden = list.children.length <= 2;
    });
  }

  add(false);
  add(false);
  const fields = [
    form.group("params.input", h("fieldset", {}, h("legend", {}, t("playground.sentences")), list), texts),
    h("div", { class: "actions start" }, h("button", { type: "button", class: "tiny", onclick: () => add() }, t("playground.add"))),
    form.add("params.input_type", t("playground.read-as"), choice([["", t("playground.default")], ["passage", t("playground.passage")], ["query", t("playground.query")]], "")),
  ];
  const table = desk(root, { ...page, form, fields, verb: t("playground.compare"), view: matrix });
}

/** The cosines of all pairs as a table. */
function matrix(result, body) {
  const { embeddings: vectors } = result;
  const texts = body.params.input;
  const cosines = vectors.map((one) => vectors.map((other) => cosine(one, other)));
  const pairs = cosines.flatMap((row, at) => row.slice(0, at).map((value, to) => [value, to + 1, at + 1])).sort((a, b) => b[0] - a[0]);
  const cell = (value) => h("td", { class: "number heat", style: { "--part": `${Math.max(0, 32 * value)}%` } }, value.toFixed(3));
  const place = h("div", { class: "result" });
  return put(place,
    pairs.length > 1 && h("p", {}, t("playground.closest", { a: pairs[0][1], b: pairs[0][2], value: pairs[0][0].toFixed(3) })),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("playground.cosines") },
      h("table", { class: "matrix" }, h("caption", { class: "faint" }, t("playground.cosines")),
        h("thead", {}, h("tr", {}, h("td", {}), texts.map((_, at) => h("th", { scope: "col", class: "number" }, at + 1)))),
        h("tbody", {}, cosines.map((row, at) => h("tr", {}, h("th", { scope: "row" }, h("span", { class: "cut", title: texts[at] }, `${at + 1}  ${texts[at]}`)), row.map(cell)))))),
    facts([[t("jobs.model"), result.model], [t("playground.dimensions"), count(result.dimensions)], [t("job.usage"), count(result.usage.total_tokens)]]));
}

function cosine(one, other) {
  const dot = one.reduce((sum, value, at) => sum + value * other[at], 0);
  return dot / (Math.hypot(...one) * Math.hypot(...other) || 1);
}
