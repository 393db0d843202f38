// Asking about a picture.

import { h } from "../dom.js";
import { choice } from "../parts.js";
import { t } from "../words.js";
import { desk } from "./desk.js";
import { filePicker } from "./files.js";
import { form as newForm, lines, number } from "./form.js";

const TASKS = ["image_qa", "image_caption", "ocr"];

/** Show the page; options: {models, session}. */
export function show(root, page) {
  const form = newForm();
  const preview = (url, name) => h("img", { src: url, alt: t("playground.preview", { name }) });
  const picker = filePicker({ label: t("playground.picture"), accept: "image/*", preview, signal: page.signal, onChange: () => table.changed() });
  const asks = () => { question.hidden = task.value !== "image_qa"; };
  const task = choice(TASKS.map((name) => [name, t(`playground.${name}`)]), "image_qa", { onchange: asks });
  const question = form.add("params.question", t("playground.question"), lines({ rows: 2 }), {
    read: (control) => (task.value === "image_qa" ? control.value.trim() || undefined : undefined),
  });
  const fields = [
    form.group("params.image_base64", picker.node, picker.base64),
    form.add("params.task", t("playground.task"), task),
    question,
    h("div", { class: "fields" },
      form.add("params.max_tokens", t("playground.max-tokens"), number({ step: 1 })),
      form.add("params.temperature", t("playground.temperature"), number())),
  ];
  const table = desk(root, { ...page, form, fields, verb: t("playground.ask"), files: () => ({ "params.image_base64": picker.name() }) });
}
