// A conversation, word by word.

import { announce, h, put } from "../dom.js";
import { count, decimal, duration } from "../format.js";
import { t, word } from "../words.js";
import { jobLink, refused, where } from "./desk.js";
import { shown as curl } from "./curl.js";
import { form as newForm, lines, number } from "./form.js";
import { send } from "./sending.js";

// The conversation outlives a look at another page, and so does an answer under way; both end with the tab. Turns:
// {role, content, job, status, error, speed}; a question whose answer failed is shown, but not sent again.
let turns = [];
let kept = { system: "", draft: "" };
let sent = null;
// Draws the page that is open.
let changed = () => {};
const always = new AbortController().signal;

/** Show the page; options: {models, session}. */
export function show(root, { signal, options }) {
  const form = newForm();
  const wrong = h("div", {});
  const log = h("div", { class: "talk", tabindex: "0", role: "region", "aria-label": t("playground.conversation") });
  const draft = lines({ rows: 2, value: kept.draft, placeholder: t("playground.say"), "aria-keyshortcuts": "Enter", onkeydown: onKey, oninput: () => { kept.draft = draft.value; } });
  draft.value = kept.draft;
  const system = lines({ rows: 3, oninput: () => { kept.system = system.value; } });
  system.value = kept.system;
  const sendButton = h("button", { class: "primary" }, t("playground.send"));
  const stopButton = h("button", { type: "button", class: "danger", onclick: () => sent?.stop() }, t("playground.stop"));

  const message = form.add("params.messages", t("playground.message"), draft, { hint: t("playground.keys"), read: messages });
  const command = curl(() => ({ type: "llm", ...form.values() }));
  put(root, h("form", { class: "columns job", onsubmit: submit, oninput: () => command.draw() },
    h("section", { class: "card chat" }, log, message, wrong,
      h("div", { class: "actions" },
        h("button", { type: "button", class: "quiet", onclick: clear }, t("playground.clear")), stopButton, sendButton)),
    h("section", { class: "card sheet", "aria-label": t("playground.settings") },
      form.add("system", t("playground.system"), system, { read: () => undefined }),
      h("div", { class: "fields" },
        form.add("params.temperature", t("playground.temperature"), number()),
        form.add("params.max_tokens", t("playground.max-tokens"), number({ step: 1 })),
        form.add("params.top_p", t("playground.top-p"), number()),
        form.add("params.seed", t("playground.seed"), number({ step: 1 }))),
      where(form, options), command.node)));
  changed = () => !signal.aborted && draw();
  draw();

  function messages() {
    const said = [];
    if (system.value.trim()) said.push({ role: "system", content: system.value });
    for (const [at, turn] of turns.entries()) {
      const answer = turn.role === "user" ? turns[at + 1] : turn;
      if (answer?.content && !answer.error) said.push({ role: turn.role, content: turn.content });
    }
    if (draft.value.trim()) said.push({ role: "user", content: draft.value });
    return said;
  }

  function onKey(event) {
    // Not while a Chinese or Japanese word is being chosen.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    draft.form.requestSubmit();
  }

  function clear() {
    if (sent) return;
    turns = [];
    draw();
    command.draw();
    draft.focus();
  }

  async function submit(event) {
    event.preventDefault();
    if (sent || !draft.value.trim()) return;
    form.clear();
    put(wrong);
    const body = { type: "llm", ...form.values() };
    const question = { role: "user", content: draft.value };
    const answer = { role: "assistant", content: "", status: "queued" };
    turns.push(question, answer);
    draft.value = kept.draft = "";
    const begun = performance.now();
    let first = null;
    let last = null;
    const heard = ({ event: name, data }) => {
      if (name === "job") answer.job = data;
      else if (name === "status") {
        answer.status = data.status;
        answer.reason = data.queued_reason;
        // A new attempt begins its answer anew.
        if (data.status === "running") answer.content = "";
      } else if (name === "token" && data.choice === 0) {
        last = performance.now();
        first ??= last;
        answer.content += data.delta;
        answer.speed = speed(begun, first);
      } else return;
      drawSoon();
    };
    sent = send(body, { signal: always, heard, leaving: "cancel" });
    draw();
    log.scrollTop = log.scrollHeight;
    try {
      const job = await sent.ended;
      answer.status = job.status;
      if (job.result) {
        answer.content = job.result.response;
        answer.speed = speed(begun, first, last, job.result);
      } else if (job.status !== "cancelled") answer.error = job.error?.message ?? word("status", job.status);
      answer.warnings = job.warnings;
      announce(answer.error ?? answer.content);
    } catch (error) {
      if (answer.job) answer.error = error.message;
      else {
        turns = turns.filter((turn) => turn !== question && turn !== answer);
        draft.value = kept.draft = question.content;
        refused(error, form, wrong);
      }
    } finally {
      sent = null;
      changed();
    }
    if (signal.aborted) return;
    command.draw();
    if (document.activeElement === document.body) draft.focus();
  }

  function draw() {
    sendButton.hidden = sent !== null;
    stopButton.hidden = sent === null;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    put(log, turns.length ? turns.map(shownTurn) : h("p", { class: "empty" }, t("playground.chat-empty")));
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
}

let scheduled = false;
function drawSoon() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    changed();
  });
}

function shownTurn(turn) {
  const alive = turn.status === "queued" || turn.status === "running";
  const waits = alive && !turn.content && h("p", { class: "faint" }, turn.reason ?? t(turn.status === "queued" ? "playground.waits" : "playground.thinks"));
  return h("article", { class: `turn ${turn.role}`, "aria-label": t(`playground.${turn.role}`) },
    turn.content && h("div", { class: "said" }, turn.content), waits,
    turn.error && h("p", { class: "note bad" }, turn.error),
    turn.warnings?.length > 0 && h("p", { class: "faint" }, turn.warnings.join(" ")),
    turn.role === "assistant" && h("p", { class: "faint meta" },
      turn.job && jobLink(turn.job), turn.status === "cancelled" && h("span", {}, t("playground.stopped")),
      (turn.speed ?? []).map((text) => h("span", {}, text))));
}

/** Time to the first token and tokens a second, in words; of the job's own count of tokens once that is known. */
function speed(begun, first, last = null, result = null) {
  if (first === null) return [];
  const told = [t("playground.first-token", { time: duration((first - begun) / 1000) })];
  const tokens = result?.usage?.completion_tokens;
  if (tokens > 1 && last > first) told.push(t("playground.speed", { n: decimal((1000 * (tokens - 1)) / (last - first), 1) }));
  if (tokens !== undefined) told.push(t("playground.tokens", { n: count(tokens) }));
  if (result) told.push(result.model);
  return told;
}
