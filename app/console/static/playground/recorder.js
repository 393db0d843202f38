// Recording speech with the browser's microphone.

import { announce, h, notify, put } from "../dom.js";
import { duration } from "../format.js";
import { t } from "../words.js";

/** A button that records until it is pressed again; take(file) gets what was said. */
export function recorder({ signal, take }) {
  let machine = null;
  let ticking = null;
  const time = h("span", { class: "faint", role: "timer" });
  const button = h("button", { type: "button", onclick: () => (machine ? machine.stop() : begin()) }, t("playground.record"));

  async function begin() {
    // Browsers give a microphone to https and to this computer alone.
    if (!navigator.mediaDevices?.getUserMedia || !window.MediaRecorder) {
      notify(t("playground.no-microphone"), "error");
      return;
    }
    let source;
    try {
      source = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      notify(`${t("playground.no-microphone")} ${error.message}`, "error");
      return;
    }
    const heard = [];
    const started = performance.now();
    machine = new MediaRecorder(source);
    machine.addEventListener("dataavailable", ({ data }) => heard.push(data));
    machine.addEventListener("stop", () => {
      const type = machine.mimeType.split(";")[0];
      end(source);
      if (!signal.aborted) take(new File(heard, `recording.${type.split("/")[1]}`, { type }));
    });
    machine.start();
    button.classList.add("danger");
    put(button, t("playground.record-stop"));
    announce(t("playground.recording"));
    ticking = setInterval(() => put(time, duration((performance.now() - started) / 1000)), 200);
  }

  function end(source) {
    clearInterval(ticking);
    for (const track of source.getTracks()) track.stop();
    machine = null;
    button.classList.remove("danger");
    put(button, t("playground.record"));
    put(time);
  }

  signal.addEventListener("abort", () => machine?.stop());
  return h("div", { class: "actions start" }, button, time);
}
