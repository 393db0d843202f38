// A form whose fields are named by what they say in the request, so that a refusal stands beside the field it means.

import { h } from "../dom.js";
import { field } from "../parts.js";
import { t } from "../words.js";

/**
 * {add, group, values, show, clear}. Paths are those of the API's errors: "priority", "params.seed".
 * A field that is empty is left out of the request: what holds then is for the API to say.
 */
export function form() {
  const fields = new Map();

  function place(path, node, control, read) {
    const wrong = h("p", { class: "wrong", id: `wrong-${path.replaceAll(".", "-")}`, hidden: true });
    node.append(wrong);
    fields.set(path, { control, wrong, read });
    return node;
  }

  return {
    /** A field with its label; read(control) gives what is sent, undefined for nothing. */
    add: (path, label, control, { hint, read = value } = {}) => place(path, field(label, control, hint), control, () => read(control)),

    /** Several controls that say one thing together. */
    group: (path, node, read) => place(path, node, node, read),

    /** What the fields say, as the request has it. */
    values() {
      const body = {};
      for (const [path, { read }] of fields) {
        const said = read();
        if (said === undefined) continue;
        const steps = path.split(".");
        const last = steps.pop();
        let inner = body;
        for (const step of steps) inner = inner[step] ??= {};
        inner[last] = said;
      }
      return body;
    },

    /** Put each message beside its field, and the cursor into the first; those without a field are given back. */
    show(errors) {
      this.clear();
      const rest = [];
      let first = null;
      for (const [path, messages] of Object.entries(errors)) {
        const name = [...fields.keys()].filter((known) => path === known || path.startsWith(`${known}.`)).sort((a, b) => b.length - a.length)[0];
        if (!name) {
          rest.push(`${path}: ${messages.join(" ")}`);
          continue;
        }
        const { control, wrong } = fields.get(name);
        wrong.textContent = [wrong.textContent, ...messages].filter(Boolean).join(" ");
        wrong.hidden = false;
        if (control.matches("input, select, textarea")) control.setAttribute("aria-invalid", "true");
        control.setAttribute("aria-describedby", wrong.id);
        first ??= control;
      }
      if (first) {
        first.closest("details")?.setAttribute("open", "");
        (first.matches("fieldset, div") ? first.querySelector("input, textarea, button") : first)?.focus();
      }
      return rest;
    },

    /** Forget every message. */
    clear() {
      for (const { control, wrong } of fields.values()) {
        wrong.textContent = "";
        wrong.hidden = true;
        control.removeAttribute("aria-invalid");
        control.removeAttribute("aria-describedby");
      }
    },
  };
}

/** A number; nothing stands for what the API or the model takes by itself. */
export const number = (attributes = {}) => h("input", { type: "number", step: "any", placeholder: t("playground.default"), ...attributes });

/** Several lines of text. */
export const lines = (attributes = {}) => h("textarea", { rows: 3, ...attributes });

function value(control) {
  if (control.type === "checkbox") return control.checked;
  if (control.value.trim() === "") return undefined;
  return control.type === "number" ? Number(control.value) : control.value;
}
