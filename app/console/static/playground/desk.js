// What the forms of the playground have in common: where a job runs, its request as a command, the jobs that were sent.

import { ApiError } from "../api.js";
import { announce, h, put } from "../dom.js";
import { moment } from "../format.js";
import * as live from "../live.js";
import { choice, progress, status } from "../parts.js";
import { shown as resultOf } from "../result.js";
import { t, word } from "../words.js";
import { shown as curl } from "./curl.js";
import { number } from "./form.js";
import { send } from "./sending.js";

const MOST_KEPT = 12;
// What was chosen last, for all types.
const chosen = { region: "", cross: true, priority: "" };

/** Fields for model, region and priority. form: of the page; models: of the type, as GET /models has them. */
export function where(form, { models, session }) {
  const ready = models.filter((model) => model.live.length);
  const rest = models.filter((model) => !model.live.length);
  const option = (model) => h("option", { value: model.id }, [model.id, ...model.live.map((place) => place.region)].join(" · "));
  const model = h("select", {}, h("option", { value: "" }, t("playground.any-model")), ready.map(option),
    rest.length > 0 && h("optgroup", { label: t("playground.not-live") }, rest.map(option)));
  const remember = (name, read) => (event) => { chosen[name] = read(event.target); };
  const region = choice([["", t("playground.any-region")], ...session.regions.map((name) => [name, name])], chosen.region, { onchange: remember("region", (node) => node.value) });
  const cross = h("input", { type: "checkbox", checked: chosen.cross, onchange: remember("cross", (node) => node.checked) });
  const priority = number({ min: 0, step: 1, value: chosen.priority, onchange: remember("priority", (node) => node.value) });
  const none = ready.length === 0 && h("p", { class: "note" }, t("playground.no-worker"));
  return h("div", { class: "where" }, none,
    form.add("model", t("jobs.model"), model),
    h("div", { class: "fields" }, form.add("region", t("jobs.region"), region), form.add("priority", t("job.priority"), priority)),
    form.group("allow_cross_region", h("div", { class: "choices" }, h("label", {}, cross, t("playground.cross"))), () => (cross.checked ? undefined : false)));
}

/** A job's id as a link to its page. */
export const jobLink = (id) => h("a", { class: "mono", href: `#/jobs/${id}` }, id.slice(0, 8));

/** What went wrong with a request, beside its fields, the rest of it into `place`. */
export function refused(error, form, place) {
  if (!(error instanceof ApiError)) throw error;
  const rest = Object.keys(error.errors).length ? form.show(error.errors) : [error.message];
  put(place, rest.length > 0 && h("div", { class: "note bad", role: "alert" }, rest.map((text) => h("p", {}, text))));
  announce(error.message);
}

/**
 * A page with a form on the left and what came of it on the right.
 * fields: elements of the form. verb: on its button. view(result, body): an element for a result; by default as on the
 * job's page. files(): see curl.js. extra(job): elements beneath a finished result.
 */
export function desk(root, { type, form, fields, verb, options, signal, view, files, extra = () => null, leaving }) {
  const wrong = h("div", {});
  const results = h("div", { class: "stack", "data-results": type });
  const empty = h("p", { class: "card empty" }, t("playground.empty"));
  const button = h("button", { class: "primary" }, verb);
  const body = () => ({ type, ...form.values() });
  const command = curl(body, files);
  const sheet = h("form", { class: "card sheet", onsubmit: submit, oninput: () => command.draw() },
    fields, h("details", { class: "fold" }, h("summary", {}, t("playground.where")), where(form, options)), wrong,
    h("div", { class: "actions start" }, button), command.node);
  put(results, empty);
  put(root, h("div", { class: "columns desk" }, sheet, h("section", { "aria-label": t("job.result") }, results)));

  async function submit(event) {
    event.preventDefault();
    form.clear();
    put(wrong);
    button.disabled = true;
    const asked = body();
    const card = run(asked, { signal, view, extra, leaving, taken: () => {
      empty.remove();
      results.prepend(card.node);
      while (results.children.length > MOST_KEPT) results.lastElementChild.remove();
      button.disabled = false;
    } });
    try {
      await card.ended;
    } catch (error) {
      if (signal.aborted) return;
      button.disabled = false;
      refused(error, form, wrong);
    }
  }

  return { changed: () => command.draw() };
}

/** A card of one job, from its first word to its end. */
function run(body, { signal, taken, view, extra, leaving }) {
  const head = h("header", {});
  const place = h("div", { class: "result" });
  const node = h("article", { class: "card run" }, head, place);
  let id = null;
  let state = "queued";
  let text = "";
  let said = null;
  const stop = h("button", { class: "tiny danger", type: "button", onclick: () => {
    stop.disabled = true;
    sent.stop();
  } }, t("playground.stop"));

  function draw() {
    const alive = state === "queued" || state === "running";
    put(head, status(state), id && jobLink(id), h("span", { class: "faint push" }, moment(new Date(1000 * live.serverTime()).toISOString())), alive && stop);
  }

  function heard({ event, data }) {
    if (event === "job") {
      id = data;
      taken();
      draw();
    } else if (event === "status") {
      // A new attempt begins its answer anew.
      if (data.status === "running") text = "";
      if (data.status !== state) {
        state = data.status;
        draw();
      }
      if (state === "queued") put(place, h("p", { class: "faint" }, data.queued_reason ?? t("playground.waits")));
    } else if (event === "progress") {
      said = progress(data);
      put(place, said, text && h("div", { class: "answer" }, text));
    } else if (event === "token" && data.choice === 0) {
      text += data.delta;
      put(place, said, h("div", { class: "answer" }, text));
    }
  }

  const sent = send(body, { signal, heard, leaving });
  const ended = sent.ended.then((job) => {
    if (!job) return;
    state = job.status;
    draw();
    announce(`${word("type", job.type)}: ${word("status", state)}`);
    const notes = job.warnings?.length > 0 && h("div", { class: "note" }, h("ul", {}, job.warnings.map((note) => h("li", {}, note))));
    if (job.result) put(place, notes, (view ?? ((result) => resultOf(job.type, result)))(job.result, body), extra(job));
    else put(place, job.error && h("div", { class: "note bad" }, h("strong", {}, job.error.code), h("p", {}, job.error.message)), text && h("div", { class: "answer" }, text), notes);
  });
  return { node, ended };
}
