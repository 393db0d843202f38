// Numbers and times as people read them.

import { locale, t } from "./words.js";

/** A whole number with separators; a dash for none. */
export const count = (number) => (number === null || number === undefined ? "–" : new Intl.NumberFormat(locale()).format(number));

/** A number with at most so many digits after the point. */
export const decimal = (number, digits = 1) =>
  number === null || number === undefined ? "–" : new Intl.NumberFormat(locale(), { maximumFractionDigits: digits }).format(number);

/** Seconds as a length of time: 340 ms, 2.4 s, 3 min 20 s, 2 h 5 min, 3 d 4 h. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.9995) return t("time.ms", { n: Math.round(seconds * 1000) });
  if (seconds < 10) return t("time.s", { n: decimal(seconds, 1) });
  const whole = Math.round(seconds);
  if (whole < 60) return t("time.s", { n: whole });
  if (whole < 3600) return join("min", Math.floor(whole / 60), "s", whole % 60);
  if (whole < 86_400) return join("h", Math.floor(whole / 3600), "min", Math.floor((whole % 3600) / 60));
  return join("d", Math.floor(whole / 86_400), "h", Math.floor((whole % 86_400) / 3600));
}

function join(large, n, small, m) {
  const first = t(`time.${large}`, { n });
  return m ? `${first} ${t(`time.${small}`, { n: m })}` : first;
}

/** Unix seconds of an RFC 3339 time, or null. */
export const unix = (text) => (text ? Date.parse(text) / 1000 : null);

/** A moment in the reader's own zone; today's without its date. */
export function moment(text) {
  if (!text) return "–";
  const at = new Date(text);
  const today = at.toDateString() === new Date().toDateString();
  const date = today ? {} : { year: "numeric", month: "short", day: "numeric" };
  return new Intl.DateTimeFormat(locale(), { ...date, hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" }).format(at);
}

/** Bytes in binary units. */
export function bytes(number) {
  if (number === null || number === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (number >= 1024 && at < units.length - 1) {
    number /= 1024;
    at += 1;
  }
  return `${decimal(number, number < 10 ? 1 : 0)} ${units[at]}`;
}

/** GiB of memory. */
export const gib = (number) => (number === null || number === undefined ? "–" : `${decimal(number, 1)} GiB`);

/** The first part of an id, which is enough to tell one from another. */
export const short = (id) => id.slice(0, 8);
