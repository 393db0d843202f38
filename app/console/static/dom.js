// Making and changing elements. No markup is ever parsed from text, so nothing a model wrote can become an element.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element. attributes: `class`, any attribute, `onclick` and the like as functions, `style` as an object of
 * CSS properties (set through CSSOM: the policy allows no style attributes). false and null leave an attribute out.
 */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for an SVG element. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, set] of Object.entries(value)) node.style.setProperty(property, set);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...flat(children));
  return node;
}

function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** Put these children in place of those that are there. */
export function put(node, ...children) {
  node.replaceChildren(...flat(children));
  return node;
}

/**
 * Show one child per item, touching only what changed, so that focus and selection survive a live update.
 * make(item) gives the element; keyOf(item) names it.
 */
export function keyed(parent, items, keyOf, make) {
  const known = (parent.keyedChildren ??= new Map());
  const shown = new Map();
  const nodes = items.map((item) => {
    const key = String(keyOf(item));
    const written = JSON.stringify(item);
    let entry = known.get(key);
    if (!entry || entry.written !== written) {
      const node = make(item);
      if (entry?.node.contains(document.activeElement)) handFocus(entry.node, node);
      entry = { node, written };
    }
    shown.set(key, entry);
    return entry.node;
  });
  parent.keyedChildren = shown;
  if (nodes.length === parent.children.length && nodes.every((node, index) => parent.children[index] === node)) return;
  const focused = document.activeElement;
  parent.replaceChildren(...nodes);
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

function handFocus(from, to) {
  const reachable = "a[href], button, input, select, textarea, [tabindex]";
  const place = [...from.querySelectorAll(reachable)].indexOf(document.activeElement);
  queueMicrotask(() => (place < 0 ? to : to.querySelectorAll(reachable)[place])?.focus({ preventScroll: true }));
}

/** Tell people who use a screen reader. */
export function announce(text) {
  const place = document.getElementById("announcer");
  if (place) place.textContent = text;
}

/** A small notice at the edge of the page that goes by itself; errors stay a little longer. */
export function notify(text, kind = "info") {
  const notice = h("div", { class: `notice ${kind}` }, text);
  document.getElementById("notices")?.append(notice);
  setTimeout(() => notice.remove(), kind === "error" ? 8000 : 4000);
}

/** A picture of 24 by 24 from a path. */
export function icon(path) {
  const drawn = s("path", { d: path, fill: "none", stroke: "currentColor", "stroke-width": 1.8, "stroke-linecap": "round", "stroke-linejoin": "round" });
  return s("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, drawn);
}

/** Ask before something that cannot be taken back; true if the answer is yes. */
export function confirmed({ title, text, yes, no }) {
  return new Promise((resolve) => {
    const dialog = h("dialog", { class: "small", "aria-labelledby": "confirm-title" },
      h("form", { method: "dialog" },
        h("h2", { id: "confirm-title" }, title),
        h("p", {}, text),
        h("div", { class: "actions" },
          h("button", { value: "no", autofocus: true }, no),
          h("button", { value: "yes", class: "danger" }, yes))));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
