// A small line or bar chart over time, drawn as SVG, with the same numbers as a table for who cannot see it.

import { h, s } from "./dom.js";
import { locale, t } from "./words.js";

const WIDTH = 360;
const HEIGHT = 180;
const EDGE = { left: 46, right: 10, top: 10, bottom: 24 };
const TICKS = 4;

let charts = 0;

/**
 * A chart with its legend and its table.
 * title: a word or two. points: [{at (unix seconds), ...values}], oldest first, evenly spaced. series: [{name, label,
 * kind: "bar" | "line", tone: "accent" | "second" | "bad"}]; bars are stacked; a null is a gap. show(value): as text;
 * tick(value): likewise, shorter.
 */
export function chart({ title, points, series, show, tick = show }) {
  const id = `chart-${(charts += 1)}`;
  const bars = series.filter(({ kind }) => kind === "bar");
  const lines = series.filter(({ kind }) => kind !== "bar");
  const heights = points.map((point) => Math.max(
    bars.reduce((sum, { name }) => sum + (point[name] ?? 0), 0), ...lines.map(({ name }) => point[name] ?? 0)));
  const top = nice(Math.max(...heights, 0));
  const step = (WIDTH - EDGE.left - EDGE.right) / points.length;
  const x = (index) => EDGE.left + step * (index + 0.5);
  const y = (value) => HEIGHT - EDGE.bottom - ((HEIGHT - EDGE.top - EDGE.bottom) * value) / top;
  const drawing = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-labelledby": `${id}-title ${id}-text` },
    s("title", { id: `${id}-title` }, title),
    s("desc", { id: `${id}-text` }, description(points, series, show)),
    Array.from({ length: TICKS + 1 }, (_, index) => (top * index) / TICKS).map((value) => [
      s("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(value), y2: y(value) }),
      s("text", { class: "tick", x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, tick(value)),
    ]),
    points.map((point, index) => (index % 15 === 14 ? s("text", { class: "tick", x: x(index), y: HEIGHT - 6, "text-anchor": index === points.length - 1 ? "end" : "middle" }, clock(point.at)) : null)),
    points.map((point, index) => stacked(point, bars).map(({ tone, from, to }) =>
      s("rect", { class: `mark ${tone}`, x: x(index) - step * 0.36, width: step * 0.72, y: y(to), height: Math.max(y(from) - y(to), 0.5), rx: 1 }))),
    lines.map(({ name, tone }) => pieces(points, name).map((piece) => (piece.length === 1
      ? s("circle", { class: `mark ${tone}`, cx: x(piece[0]), cy: y(points[piece[0]][name]), r: 2.5 })
      : s("polyline", { class: `line ${tone}`, points: piece.map((index) => `${x(index)},${y(points[index][name])}`).join(" ") })))),
    points.map((point, index) => s("rect", { class: "touch", x: x(index) - step / 2, y: EDGE.top, width: step, height: HEIGHT - EDGE.top - EDGE.bottom },
      s("title", {}, `${clock(point.at)}\n${series.map(({ name, label }) => `${label}: ${say(point[name], show)}`).join("\n")}`))));
  return h("figure", { class: "chart-box" },
    h("ul", { class: "legend" }, series.map(({ label, tone }) => h("li", { class: tone }, label))),
    drawing, table(title, points, series, show));
}

function table(title, points, series, show) {
  const rows = points.filter((point) => series.some(({ name }) => point[name])).reverse();
  return h("details", {}, h("summary", {}, t("overview.as-table")),
    h("div", { class: "scroll short", tabindex: "0", role: "region", "aria-label": title },
      h("table", {}, h("caption", { class: "hidden-visually" }, title),
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("overview.minute")), series.map(({ label }) => h("th", { scope: "col", class: "number" }, label)))),
        h("tbody", {}, rows.map((point) => h("tr", {}, h("th", { scope: "row" }, clock(point.at)),
          series.map(({ name }) => h("td", { class: "number" }, say(point[name], show)))))))));
}

function stacked(point, bars) {
  let from = 0;
  return bars.filter(({ name }) => point[name]).map(({ name, tone }) => {
    const bar = { tone, from, to: from + point[name] };
    from = bar.to;
    return bar;
  });
}

/** Runs of neighbouring points that have a value. */
function pieces(points, name) {
  const found = [];
  points.forEach((point, index) => {
    if (point[name] === null || point[name] === undefined) return;
    if (found.at(-1)?.at(-1) === index - 1) found.at(-1).push(index);
    else found.push([index]);
  });
  return found;
}

function description(points, series, show) {
  return series.map(({ name, label }) => {
    const known = points.map((point) => point[name]).filter((value) => value !== null && value !== undefined);
    return known.length ? `${label}: ${show(Math.min(...known))} – ${show(Math.max(...known))}` : `${label}: –`;
  }).join("; ");
}

const say = (value, show) => (value === null || value === undefined ? "–" : show(value));
const clock = (at) => new Intl.DateTimeFormat(locale(), { hour: "2-digit", minute: "2-digit", hourCycle: "h23" }).format(new Date(at * 1000));

/** A round number at or above the value, that divides well by TICKS. */
function nice(value) {
  if (value <= 0) return TICKS;
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 8, 10, 20].map((factor) => factor * scale).find((round) => round >= value * 1.0001 || round === value);
}
