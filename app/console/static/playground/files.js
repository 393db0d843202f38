// A file that is chosen, dropped or pasted, as Base64.

import { h, put } from "../dom.js";
import { bytes } from "../format.js";
import { t } from "../words.js";

/**
 * {node, input, take(file), base64(), name()}. accept: as in an input's attribute; preview(url, name): what shows the
 * file. onChange: called when another file is there.
 */
export function filePicker({ label, accept, preview, signal, onChange = () => {} }) {
  let text;
  let chosen = null;
  let url = null;
  const input = h("input", { type: "file", accept, id: `file-${(pickers += 1)}`, onchange: () => input.files[0] && take(input.files[0]) });
  const shown = h("div", { class: "preview" });
  const kind = accept.split("/")[0];
  const node = h("div", { class: "drop" },
    h("label", { for: input.id }, label), input, h("p", { class: "faint" }, t(`playground.drop-${kind}`)), shown);

  node.addEventListener("dragover", (event) => {
    event.preventDefault();
    node.classList.add("over");
  });
  node.addEventListener("dragleave", () => node.classList.remove("over"));
  node.addEventListener("drop", (event) => {
    event.preventDefault();
    node.classList.remove("over");
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith(`${kind}/`));
    if (!file) return;
    event.preventDefault();
    take(file);
  }, { signal });
  signal.addEventListener("abort", forget);

  function forget() {
    if (url) URL.revokeObjectURL(url);
    url = null;
  }

  async function take(file) {
    const read = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => resolve(reader.result));
      reader.addEventListener("error", () => reject(reader.error));
      reader.readAsDataURL(file);
    });
    if (signal.aborted) return;
    forget();
    // An empty file's has no comma.
    text = read.slice(read.indexOf(",") + 1);
    chosen = file;
    if (input.files[0] !== file) {
      const list = new DataTransfer();
      list.items.add(file);
      input.files = list.files;
    }
    url = URL.createObjectURL(file);
    put(shown, preview(url, file.name), h("p", { class: "faint" }, `${file.name} · ${bytes(file.size)}`));
    onChange();
  }

  return { node, input, take, base64: () => text, name: () => chosen?.name ?? t("playground.your-file") };
}

let pickers = 0;
