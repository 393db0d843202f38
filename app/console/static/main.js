// The shell: sign-in, navigation, language and theme, and which page is shown.

import { ApiError, get, key, onKeyNeeded, useKey } from "./api.js";
import { announce, h, icon, put } from "./dom.js";
import * as live from "./live.js";
import * as hosts from "./pages/hosts.js";
import * as job from "./pages/job.js";
import * as jobs from "./pages/jobs.js";
import * as keys from "./pages/keys.js";
import * as overview from "./pages/overview.js";
import * as playground from "./pages/playground.js";
import { language, locale, speak, t } from "./words.js";

// A page is a module with `show(root, page)`. page: {args, query, signal, session, title(text)}: `args` are the parts of
// the address after the page's name, `signal` is aborted when the reader leaves, and everything the page started must
// end with it. `show` may be async; what it raises is shown as an error.
const PAGES = {
  overview: { module: overview, path: "M4 13h6V4H4zM14 20h6V4h-6zM4 20h6v-3H4z" },
  jobs: { module: jobs, path: "M8 6h12M8 12h12M8 18h12M4 6h.01M4 12h.01M4 18h.01" },
  playground: { module: playground, path: "M5 5h14v11H10l-5 4z" },
  hosts: { module: hosts, path: "M4 5h16v5H4zM4 14h16v5H4zM8 7.5h.01M8 16.5h.01", needs: (session) => session.hosts },
  keys: { module: keys, path: "M14.5 9.5a4.5 4.5 0 1 1-3-3L20 6v3h-2v2h-2zM8 11h.01", needs: isAdmin },
};
const THEME = "console.theme";
const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = {
  auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M5 19l1.4-1.4M17.6 6.4 19 5",
  dark: "M20 14a8 8 0 1 1-10-10 6.5 6.5 0 0 0 10 10z",
};

let session = null;
let leaving = null;

function isAdmin(who) {
  return who.scopes.includes("admin");
}

/** The address's page, parts and query: #/jobs/123?status=failed. */
function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...args] = path.split("/").map(decodeURIComponent);
  return { name: name || "overview", args, query: new URLSearchParams(query) };
}

function theme() {
  const chosen = localStorage.getItem(THEME);
  return THEMES.includes(chosen) ? chosen : "auto";
}

function wear(chosen) {
  localStorage.setItem(THEME, chosen);
  document.documentElement.dataset.theme = chosen;
}

function shell() {
  document.documentElement.lang = locale();
  const open = Object.entries(PAGES).filter(([, page]) => !page.needs || page.needs(session));
  put(document.body,
    h("a", { class: "skip", href: "#main", onclick: skip }, t("shell.skip")),
    h("header", { class: "bar" },
      h("a", { class: "brand", href: "#/overview" }, brandMark(), h("span", {}, t("shell.title"))),
      h("nav", { "aria-label": t("shell.pages") },
        h("ul", {}, open.map(([name, page]) =>
          h("li", {}, h("a", { href: `#/${name}`, "data-page": name }, icon(page.path), h("span", {}, t(`page.${name}`))))))),
      h("div", { class: "tools" },
        h("span", { class: "live", id: "live" }, h("i", {}), h("span", { id: "live-words" }, t("live.waiting"))),
        themeButton(), languageButton(),
        key() && h("button", { class: "quiet", onclick: signOut }, t("shell.sign-out")))),
    h("main", { id: "main", tabindex: "-1" }),
    h("div", { id: "announcer", class: "hidden-visually", role: "status", "aria-live": "polite" }),
    h("div", { id: "notices", role: "alert" }));
}

function brandMark() {
  return h("img", { src: new URL("./icon.svg", import.meta.url), alt: "", width: 26, height: 26 });
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

function themeButton() {
  const chosen = theme();
  const next = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
  const label = `${t("shell.theme")}: ${t(`theme.${chosen}`)}`;
  const press = (event) => {
    wear(next);
    announce(`${t("shell.theme")}: ${t(`theme.${next}`)}`);
    const fresh = themeButton();
    event.currentTarget.replaceWith(fresh);
    fresh.focus();
  };
  return h("button", { class: "quiet square", id: "theme", title: label, "aria-label": label, onclick: press }, icon(THEME_ICONS[chosen]));
}

function languageButton() {
  const other = language() === "zh" ? "en" : "zh";
  const press = () => {
    speak(other);
    shell();
    document.getElementById("language").focus();
    route();
  };
  const named = { en: "English", zh: "中文" };
  return h("button", { class: "quiet", id: "language", lang: other === "zh" ? "zh-CN" : "en", onclick: press }, named[other]);
}

function signOut() {
  useKey(null);
  // Nothing that was shown to this key is left for the next one.
  location.reload();
}

/** Ask for a key until one is given. */
function askForKey(error) {
  return new Promise((resolve) => {
    const input = h("input", { type: "password", id: "key", name: "key", autocomplete: "off", required: true, spellcheck: "false", "aria-describedby": "key-why" });
    const refused = error.code === "key_refused";
    const dialog = h("dialog", { class: "small", "aria-labelledby": "sign-in-title", lang: locale() },
      h("form", { method: "dialog" },
        h("h2", { id: "sign-in-title" }, t("sign-in.title")),
        h("p", { id: "key-why", class: refused ? "problem" : "" }, refused ? t("sign-in.refused") : t("sign-in.why")),
        h("label", { for: "key" }, t("sign-in.key")), input,
        h("p", { class: "faint" }, t("sign-in.kept")),
        h("div", { class: "actions" }, h("button", { class: "primary" }, t("sign-in.go")))));
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(input.value.trim());
    });
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
}

/** What went wrong, as a box. */
function failure(error) {
  if (!(error instanceof ApiError)) console.error(error);
  const title = error.status === 403 ? t("error.forbidden") : error.status === 0 ? t("error.unreachable") : t("error.title");
  return h("div", { class: "card problem", role: "alert" }, h("h2", {}, title), h("p", {}, error.message),
    h("button", { onclick: route }, t("error.again")));
}

async function route() {
  leaving?.abort();
  const mine = (leaving = new AbortController());
  const { name, args, query } = address();
  const shown = name === "jobs" && args.length ? job : PAGES[name]?.module;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const root = h("div", { class: `page page-${name}` });
  put(document.getElementById("main"), root);
  const title = (text) => {
    document.title = `${text} · ${t("shell.title")}`;
    announce(text);
  };
  title(t(`page.${PAGES[name] ? name : "none"}`));
  try {
    if (!shown) throw new ApiError(404, { detail: t("error.no-page") });
    await shown.show(root, { args, query, signal: mine.signal, session, title });
  } catch (error) {
    if (!mine.signal.aborted) put(root, failure(error));
  }
}

function showLive(_, __, connected) {
  const place = document.getElementById("live");
  if (!place || connected === null) return;
  place.classList.toggle("on", connected);
  place.classList.toggle("off", !connected);
  const words = document.getElementById("live-words");
  const text = t(connected ? "live.on" : "live.off");
  if (words.textContent !== text) words.textContent = text;
}

/** Find out who asks, then show what they may see. */
async function enter() {
  try {
    session = await get("console/session");
  } catch (error) {
    leaving?.abort();
    put(document.body, h("main", { id: "main", class: "alone" }, h("h1", {}, t("shell.title")), failureAlone(error)));
    return;
  }
  shell();
  live.start();
  await route();
}

function failureAlone(error) {
  const again = () => {
    if (error.status !== 0) useKey(null);
    enter();
  };
  return h("div", { class: "card problem", role: "alert" },
    h("h2", {}, error.status === 403 ? t("error.forbidden") : t("error.title")), h("p", {}, error.message),
    h("button", { onclick: again }, t("error.again")));
}

wear(theme());
document.documentElement.lang = locale();
onKeyNeeded(askForKey);
live.watch(showLive, new AbortController().signal);
addEventListener("hashchange", () => {
  // Until it is known who asks there is nothing to put a page into; enter() shows what the address says by then.
  if (!session) return;
  route();
  window.scrollTo(0, 0);
  document.getElementById("main")?.focus({ preventScroll: true });
});
enter();
