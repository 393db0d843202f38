// The request as a command for a shell.

import { key } from "../api.js";
import { h, put } from "../dom.js";
import { copyButton } from "../parts.js";
import { t } from "../words.js";

const FILE = "\u0000";

/**
 * What sends the body. files: names by the path of the field that holds a file's Base64. The key is named, not shown.
 */
export function command(body, files = {}) {
  const told = structuredClone(body);
  const attached = [];
  for (const [path, name] of Object.entries(files)) {
    const steps = path.split(".");
    const last = steps.pop();
    const holder = steps.reduce((inner, step) => inner?.[step], told);
    if (!holder?.[last]) continue;
    holder[last] = FILE;
    attached.push(name);
  }
  const url = new URL("../../api/v1/jobs/stream", import.meta.url);
  const json = JSON.stringify(told, null, 2);
  const head = [`curl -N -X POST ${quoted(url.href)}`, key() && '-H "Authorization: Bearer $GPU_API_KEY"', "-H 'Content-Type: application/json'"];
  if (!attached.length) return [...head, `-d ${quoted(json)}`].filter(Boolean).join(" \\\n  ");
  const parts = json.split(JSON.stringify(FILE).slice(1, -1)).map((part) => `printf %s ${quoted(part)}`);
  const pieces = parts.flatMap((part, at) => (at ? [`base64 < ${quoted(attached[at - 1])} | tr -d '\\n'`, part] : [part]));
  return `{ ${pieces.join("\n  ")}\n} | ${[...head, "-d @-"].filter(Boolean).join(" \\\n  ")}`;
}

/** The command, folded away: {node, draw}. body() and files() are asked when it is looked at. */
export function shown(body, files = () => ({})) {
  const text = h("pre", { tabindex: "0", "aria-label": t("playground.curl") });
  const draw = () => {
    if (node.open) put(text, command(body(), files()));
  };
  const node = h("details", { ontoggle: draw },
    h("summary", {}, t("playground.curl")), text,
    h("div", { class: "actions" }, copyButton(() => command(body(), files()))));
  return { node, draw };
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
