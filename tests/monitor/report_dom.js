// The least of a browser that the report's script needs. It runs the script of the page that is named, and prints what it
// has drawn as JSON.
"use strict";
const fs = require("fs");
const html = fs.readFileSync(process.argv[2], "utf8");
const drawn = html.match(/<script type="application\/json" id="drawn">([^]*?)<\/script>/)[1];
const script = html.match(/<script>([^]*)<\/script>/)[1];

class Node {
  constructor(name) {
    Object.assign(this, { name, attributes: {}, children: [], style: {}, dataset: {}, listeners: {}, textContent: "" });
    Object.assign(this, { clientWidth: 900, offsetHeight: 20, offsetWidth: 100 });
  }
  setAttribute(key, value) { this.attributes[key] = value; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  addEventListener(name, act) { this.listeners[name] = act; }
  getBoundingClientRect() { return { left: 0, top: 0, width: 900, height: 330 }; }
  *all() { for (const child of this.children) if (child instanceof Node) { yield child; yield* child.all(); } }
  words() { return this.children.map((child) => (child instanceof Node ? child.words() : String(child))).join(""); }
}

const known = {};
for (const name of ["theme", "charts", "smooth", "logarithmic", "axis", "marks"]) if (html.includes(`id="${name}"`)) known[name] = new Node(name);
known.drawn = { textContent: drawn };
global.document = {
  getElementById: (name) => known[name] || null,
  createElement: (name) => new Node(name),
  createElementNS: (space, name) => new Node(name),
  documentElement: new Node("html"),
};
global.matchMedia = () => ({ matches: false });
global.addEventListener = () => {};
global.ResizeObserver = class { observe() {} };
(0, eval)(script);

const count = (name) => (known.charts ? [...known.charts.all()].filter((node) => node.name === name).length : 0);
const bad = () => [...known.charts.all()].filter((node) => Object.values(node.attributes).some((value) => /NaN|undefined/.test(value))).length;
const result = { charts: known.charts ? known.charts.children.length : 0 };
if (known.charts) {
  Object.assign(result, { paths: count("path"), marks: [...known.charts.all()].filter((node) => node.attributes.class === "mark").length, bad: bad() });
  known.logarithmic.checked = true;
  known.logarithmic.listeners.change({ target: known.logarithmic });
  known.axis.value = "tokens";
  known.axis.listeners.change({ target: known.axis });
  const wide = known.charts.children[0], svg = wide.children[1], tip = wide.children[2];
  svg.listeners.pointermove({ clientX: 450, clientY: 50, buttons: 0 });
  Object.assign(result, { tip: tip.words(), bad_later: bad() });
  for (const button of known.marks.children) button.listeners.click();
  result.marks_later = [...known.charts.all()].filter((node) => node.attributes.class === "mark").length;
}
known.theme.listeners.click();
result.theme = document.documentElement.dataset.theme;
process.stdout.write(JSON.stringify(result));
