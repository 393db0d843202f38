// Drawing pictures.

import { h } from "../dom.js";
import { t } from "../words.js";
import { desk } from "./desk.js";
import { form as newForm, lines, number } from "./form.js";

const SIDES = [512, 768, 1024, 1280, 1536];

/** Show the page; options: {models, session}. */
export function show(root, page) {
  const form = newForm();
  const sides = h("datalist", { id: "sides" }, SIDES.map((side) => h("option", { value: side })));
  const side = () => number({ step: 8, list: "sides" });
  const seed = number({ step: 1 });
  const fields = [
    form.add("params.prompt", t("playground.prompt"), lines({ rows: 4, required: true })),
    form.add("params.negative_prompt", t("playground.negative"), lines({ rows: 2 })),
    h("div", { class: "fields" },
      form.add("params.width", t("playground.width"), side()), form.add("params.height", t("playground.height"), side()),
      form.add("params.steps", t("playground.steps"), number({ step: 1 })), form.add("params.guidance_scale", t("playground.guidance"), number()),
      form.add("params.seed", t("playground.seed"), seed)),
    sides,
  ];
  const extra = (job) => {
    const press = () => {
      seed.value = job.result.seed;
      table.changed();
      seed.focus();
    };
    return h("div", { class: "actions start" }, h("button", { type: "button", class: "tiny", onclick: press }, t("playground.keep-seed", { seed: job.result.seed })));
  };
  const table = desk(root, { ...page, form, fields, verb: t("playground.draw"), extra });
}
