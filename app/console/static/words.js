// What the console says, in the reader's language.

import en from "./words/en.js";
import zh from "./words/zh.js";

const CHOICE = "console.language";
const LANGUAGES = { en, zh };

let current = localStorage.getItem(CHOICE) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
if (!(current in LANGUAGES)) current = "en";

/** "en" or "zh". */
export const language = () => current;

/** The tag for Intl and for the lang attribute. */
export const locale = () => navigator.languages.find((tag) => tag.toLowerCase().startsWith(current)) ?? (current === "zh" ? "zh-CN" : "en");

/** Speak this language from now on. */
export function speak(chosen) {
  current = chosen;
  localStorage.setItem(CHOICE, chosen);
}

/** The words for a key, with {names} filled in. A key without words shows itself. */
export function t(key, values = {}) {
  const text = LANGUAGES[current][key] ?? en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
}

/** The words for a value that the API may grow, such as a state: the value itself where there are none. */
export const word = (group, value) => LANGUAGES[current][`${group}.${value}`] ?? value;
