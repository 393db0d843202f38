// The regions on a schematic map of the world: a net of degrees and a dot for each, no coasts, no data from elsewhere.

import { s } from "./dom.js";
import { count } from "./format.js";
import { t } from "./words.js";

const WIDTH = 480;
const HEIGHT = 230;
// Degrees: nobody puts GPUs nearer to the poles.
const NORTH = 72;
const SOUTH = -48;

/** An equirectangular map. regions: as the feed has them. */
export function map(regions) {
  const { x, y, west, east } = projection(regions);
  const meridians = range(Math.ceil(west / 30) * 30, east, 30);
  const parallels = [60, 30, 0, -30].filter((degree) => degree <= NORTH && degree >= SOUTH);
  const most = Math.max(1, ...regions.map((region) => region.queued + region.running));
  return s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "map", role: "img", "aria-label": t("overview.map-text") },
    meridians.map((degree) => s("line", { class: degree === 0 ? "grid strong" : "grid", x1: x(degree), x2: x(degree), y1: 0, y2: HEIGHT })),
    parallels.map((degree) => [
      s("line", { class: degree === 0 ? "grid strong" : "grid", x1: 0, x2: WIDTH, y1: y(degree), y2: y(degree) }),
      s("text", { class: "tick", x: 6, y: y(degree) - 4 }, degree === 0 ? "0°" : `${Math.abs(degree)}° ${degree > 0 ? "N" : "S"}`),
    ]),
    meridians.filter((degree) => degree % 60 === 0 && x(degree) > 50 && x(degree) < WIDTH - 30).map((degree) =>
      s("text", { class: "tick", x: x(degree) + 4, y: HEIGHT - 6 }, degree === 0 ? "0°" : `${Math.abs(degree)}° ${degree > 0 ? "E" : "W"}`)),
    placed(regions, x, y).map(({ region, cx, cy, label }) => s("g", { class: `region ${tone(region)}` },
      s("title", {}, words(region)),
      s("circle", { class: "halo", cx, cy, r: 8 + 18 * Math.sqrt((region.queued + region.running) / most) * (region.queued + region.running ? 1 : 0) }),
      s("circle", { class: "dot", cx, cy, r: 6 }),
      s("text", { class: "name", x: label.x, y: label.y, "text-anchor": label.anchor }, region.name),
      s("text", { class: "tick", x: label.x, y: label.y + 14, "text-anchor": label.anchor }, summary(region)))));
}

/** Good while somebody serves and it is reachable. */
function tone(region) {
  if (!region.reachable) return "bad";
  return region.workers ? "good" : "idle";
}

const summary = (region) => (region.reachable ? `${count(region.used)} / ${count(region.slots)}` : t("overview.unreachable"));

function words(region) {
  return `${region.name}: ${t("overview.queued")} ${region.queued}, ${t("overview.running")} ${region.running}, ${t("overview.workers")} ${region.workers}`;
}

/** The whole world between the polar circles. */
function projection() {
  const [west, east] = [-180, 180];
  return {
    west, east,
    x: (degree) => ((degree - west) / (east - west)) * WIDTH,
    y: (degree) => ((NORTH - degree) / (NORTH - SOUTH)) * HEIGHT,
  };
}

/** Where each dot and its label go: labels of near regions evade each other. */
function placed(regions, x, y) {
  const taken = [];
  return [...regions].sort((one, other) => other.latitude - one.latitude).map((region) => {
    const cx = x(region.longitude);
    const cy = Math.min(Math.max(y(region.latitude), 12), HEIGHT - 12);
    const length = 7.4 * region.name.length;
    const tries = [
      { x: cx + 14, y: cy, anchor: "start" }, { x: cx - 14, y: cy, anchor: "end" },
      { x: cx + 14, y: cy + 26, anchor: "start" }, { x: cx - 14, y: cy + 26, anchor: "end" },
      { x: cx + 14, y: cy - 24, anchor: "start" }, { x: cx - 14, y: cy - 24, anchor: "end" },
      { x: cx, y: cy + 50, anchor: "middle" },
    ];
    const box = (label) => {
      const left = label.anchor === "start" ? label.x : label.anchor === "end" ? label.x - length : label.x - length / 2;
      return { left, right: left + length, top: label.y - 12, bottom: label.y + 16 };
    };
    const free = (one) => one.left > 2 && one.right < WIDTH - 2 && one.bottom < HEIGHT &&
      taken.every((other) => one.right < other.left || other.right < one.left || one.bottom < other.top || other.bottom < one.top);
    const label = tries.find((candidate) => free(box(candidate))) ?? tries[0];
    taken.push(box(label), { left: cx - 8, right: cx + 8, top: cy - 8, bottom: cy + 8 });
    return { region, cx, cy, label };
  });
}

function range(from, to, step) {
  return Array.from({ length: Math.floor((to - from) / step) + 1 }, (_, index) => from + index * step);
}
