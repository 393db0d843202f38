// Writing down what is said, recorded here or in a file.

import { h } from "../dom.js";
import { choice } from "../parts.js";
import { locale, t } from "../words.js";
import { desk } from "./desk.js";
import { filePicker } from "./files.js";
import { form as newForm, number } from "./form.js";
import { recorder } from "./recorder.js";

// Those that are spoken most; the API knows more, by their codes.
const LANGUAGES = ["zh", "en", "es", "hi", "ar", "pt", "ru", "ja", "de", "fr", "ko", "it", "tr", "vi"];

/** Show the page; options: {models, session}. */
export function show(root, page) {
  const form = newForm();
  const names = new Intl.DisplayNames([locale()], { type: "language" });
  const preview = (url, name) => h("audio", { src: url, controls: true, "aria-label": t("playground.preview", { name }) });
  const picker = filePicker({ label: t("playground.sound"), accept: "audio/*", preview, signal: page.signal, onChange: () => table.changed() });
  const language = h("input", { list: "languages", placeholder: t("playground.detect"), autocomplete: "off" });
  const fields = [
    recorder({ signal: page.signal, take: picker.take }),
    form.group("params.audio_base64", picker.node, picker.base64),
    h("div", { class: "fields" },
      form.add("params.task", t("playground.task"), choice([["transcribe", t("playground.transcribe")], ["translate", t("playground.translate")]], "transcribe")),
      form.add("params.language", t("job.language"), language)),
    h("datalist", { id: "languages" }, LANGUAGES.map((code) => h("option", { value: code, label: names.of(code) }))),
    form.add("params.prompt", t("playground.names"), h("input", { autocomplete: "off" }), { hint: t("playground.names-why") }),
    h("div", { class: "fields" }, form.add("params.temperature", t("playground.temperature"), number())),
  ];
  const table = desk(root, { ...page, form, fields, verb: t("playground.write"), files: () => ({ "params.audio_base64": picker.name() }) });
}
