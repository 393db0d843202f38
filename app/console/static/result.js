// A job's result, shown as what it is: words, a picture, segments of speech, numbers.

import { h } from "./dom.js";
import { count, decimal, duration } from "./format.js";
import { copyButton, facts } from "./parts.js";
import { t } from "./words.js";

const MOST_ROWS = 200;
const FIRST_NUMBERS = 6;

/** An element for a result of a type; the whole of it as JSON below. */
export function shown(type, result) {
  const view = VIEWS[type]?.(result) ?? null;
  return h("div", { class: "result" }, view, whole(result));
}

const VIEWS = {
  llm: (result) => [
    (result.choices ?? [{ response: result.response }]).map((choice) => answer(choice.response)),
    spent(result),
  ],
  vision: (result) => [answer(result.response), spent(result)],
  image_gen: (result) => [
    h("img", { class: "picture", src: picture(result), width: result.width, height: result.height, alt: t("job.picture", { n: `${result.width} × ${result.height}` }) }),
    h("div", { class: "actions start" }, h("a", { class: "button", href: picture(result), download: `picture-${result.seed}.${result.format}` }, t("job.download"))),
    facts([["seed", result.seed], ["steps", result.steps], ["guidance_scale", result.guidance_scale], [t("jobs.model"), result.model]]),
  ],
  whisper: (result) => [
    answer(result.text),
    facts([[t("job.language"), result.language], [t("job.length"), duration(result.duration)], [t("jobs.model"), result.model]]),
    result.segments.length > 0 && grid(t("job.segments"), [t("job.from"), t("job.to"), t("job.text")],
      result.segments.slice(0, MOST_ROWS).map((segment) => [clock(segment.start), clock(segment.end), segment.text])),
  ],
  embedding: (result) => [
    h("p", {}, t("job.vectors", { n: count(result.embeddings.length), size: count(result.dimensions) })),
    grid(t("job.result"), [t("job.vector"), t("job.numbers"), t("job.length")],
      result.embeddings.slice(0, MOST_ROWS).map((vector, index) => [
        String(index + 1), `${vector.slice(0, FIRST_NUMBERS).map((number) => number.toFixed(4)).join("  ")} …`,
        decimal(Math.hypot(...vector), 3)])),
    spent(result),
  ],
  comfyui: (result) => (result.images ?? []).filter((image) => image.image_base64).map((image, index) =>
    h("img", { class: "picture", src: picture(image), alt: t("job.picture", { n: index + 1 }) })),
};

const picture = (image) => `data:image/${image.format ?? "png"};base64,${image.image_base64}`;
const answer = (text) => h("div", { class: "answer" }, text);

function spent({ usage, finish_reason: reason, model }) {
  const tokens = usage && (usage.completion_tokens === undefined
    ? count(usage.total_tokens)
    : t("job.usage-text", { prompt: count(usage.prompt_tokens), completion: count(usage.completion_tokens) }));
  return facts([[t("jobs.model"), model], [t("job.usage"), tokens], [t("job.finish"), reason]]);
}

/** mm:ss.s of seconds. */
const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;

function grid(caption, columns, rows) {
  return h("div", { class: "scroll short", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {}, h("caption", { class: "hidden-visually" }, caption),
      h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell)))))));
}

/** Written only when it is opened: a picture's is megabytes. */
function whole(result) {
  const place = h("div", {});
  const open = (event) => {
    if (!event.currentTarget.open || place.hasChildNodes()) return;
    const text = JSON.stringify(result, shorten, 2);
    place.append(h("pre", { tabindex: "0" }, text), h("div", { class: "actions" }, copyButton(() => JSON.stringify(result))));
  };
  return h("details", { ontoggle: open }, h("summary", {}, t("job.whole")), place);
}

function shorten(_, value) {
  if (typeof value === "string" && value.length > 4000) return `${value.slice(0, 120)} … (${count(value.length)})`;
  if (Array.isArray(value) && value.length > 64 && typeof value[0] === "number") return [...value.slice(0, FIRST_NUMBERS), `… (${count(value.length)})`];
  return value;
}
