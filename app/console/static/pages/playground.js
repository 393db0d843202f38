// Trying each type of job: chat, pictures, questions about pictures, speech, comparing sentences.

import { ApiError, get } from "../api.js";
import { h, put } from "../dom.js";
import { head } from "../parts.js";
import * as chat from "../playground/chat.js";
import * as embedding from "../playground/embedding.js";
import * as image from "../playground/image.js";
import * as speech from "../playground/speech.js";
import * as vision from "../playground/vision.js";
import { t, word } from "../words.js";

const TYPES = { llm: chat, image_gen: image, vision, whisper: speech, embedding };

/** Show the page until the signal says that the reader has left. */
export async function show(root, { args: [type = "llm"], signal, session, title }) {
  if (!(type in TYPES)) throw new ApiError(404, { detail: t("error.no-page") });
  title(`${t("page.playground")}: ${word("type", type)}`);
  const tabs = h("div", { class: "tabs", role: "navigation", "aria-label": t("playground.types") },
    h("ul", {}, Object.keys(TYPES).map((name) => h("li", {}, h("a", { href: `#/playground/${name}`, "aria-current": name === type && "page" }, t(`playground.${name}`))))));
  const place = h("div", { class: "play" });
  put(root, head(t("page.playground")), tabs, place);
  if (!session.scopes.includes("infer") && !session.scopes.includes("admin")) {
    put(place, h("p", { class: "note" }, t("playground.no-scope")));
    return;
  }
  const { items: models } = await get("models", { type }, signal);
  TYPES[type].show(place, { type, signal, options: { models, session } });
}
