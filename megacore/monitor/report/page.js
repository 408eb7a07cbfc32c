"use strict";
// Draws the curves of the page from the JSON beside it. Texts only ever become text nodes.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const SHADES = { save: "grey", resume: "blue", start: "blue", stop: "orange", finish: "green", skip: "orange", spike: "red",
    rewind: "purple", hang: "red", straggler: "pink", corruption: "red", fault: "red", alert: "orange", save_failed: "red" };
  const data = JSON.parse(document.getElementById("drawn").textContent);
  const state = { smooth: 30, log: false, axis: "step", hidden: new Set(), range: null };
  const shade = (name) => `var(--${name})`;

  function make(name, attributes, ...children) {
    const node = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    for (const child of children) node.append(child);
    return node;
  }

  function show(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e12) return (value / 1e12).toPrecision(3) + "T";
    if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
    if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
    if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
    if (size < 1e-3) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  }

  // Round numbers within [low, high]: 1, 2 or 5 times a power of ten apart.
  function ticks(low, high, count) {
    if (!(high > low)) return [low];
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const gap = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
    const found = [];
    for (let place = Math.ceil(low / gap - 1e-9); place <= Math.floor(high / gap + 1e-9); place++) found.push(place * gap);
    return found;
  }

  // Means over a window around each point. Where a curve begins it is no wider ahead than back: there a loss falls fast.
  function smoothed(points) {
    const reach = Math.floor((state.smooth / 100) ** 2 * points.length / 6);
    if (!reach) return points;
    const sums = [0];
    for (const point of points) sums.push(sums[sums.length - 1] + point[1]);
    return points.map(([x], place) => {
      const side = Math.min(reach, place), end = Math.min(points.length, place + side + 1);
      return [x, (sums[end] - sums[place - side]) / (end - place + side)];
    });
  }

  // Tokens at a step, between those that are known.
  function tokensAt(step) {
    const known = data.tokens;
    if (!known.length) return step;
    let high = known.findIndex((each) => each[0] >= step);
    if (high < 0) high = known.length - 1;
    const [s1, t1] = known[high], [s0, t0] = high ? known[high - 1] : [0, 0];
    return s1 === s0 ? t1 : t0 + (t1 - t0) * (step - s0) / (s1 - s0);
  }
  const place = (step) => (state.axis === "tokens" ? tokensAt(step) : step);

  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.wide = spec.name === "loss";
      const head = this.head = make("h3", {}, spec.title);
      if (spec.unit) head.append(make("small", {}, spec.unit));
      if (spec.lines.length > 1) {
        for (const line of spec.lines) {
          head.append(make("span", { class: "legend" }, make("i", { style: `background:${shade(line.shade)}` }), line.name));
        }
      }
      this.svg = make("svg:svg", { role: "img", "aria-label": spec.title });
      this.tip = make("div", { class: "tip" });
      this.box = make("div", { class: this.wide ? "chart wide" : "chart" }, head, this.svg, this.tip);
      this.svg.addEventListener("pointermove", (event) => this.move(event));
      this.svg.addEventListener("pointerleave", () => { this.from = null; hover(null, null); });
      this.svg.addEventListener("pointerdown", (event) => { this.from = this.at(event); });
      this.svg.addEventListener("pointerup", (event) => this.zoom(this.at(event)));
      this.svg.addEventListener("dblclick", () => { state.range = null; drawAll(); });
    }

    draw() {
      const width = Math.max(240, this.box.clientWidth || 600), height = this.wide ? 330 : 170;
      const area = { left: 52, right: width - 12, top: 8, bottom: height - 22 };
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.style.height = height + "px";
      this.svg.replaceChildren();
      const lines = this.spec.lines.map((line) => {
        const points = line.points.map(([x, y]) => [place(x), y]);
        return { ...line, points, soft: line.name === "validation" ? points : smoothed(points) };
      });
      const xs = data.charts.flatMap((each) => each.lines.flatMap((line) => [line.points[0][0], line.points[line.points.length - 1][0]]));
      const [first, last] = state.range || [place(Math.min(...xs)), place(Math.max(...xs))];
      const inside = (points) => points.filter(([x]) => x >= first && x <= last);
      const log = this.wide && state.log;
      const turn = (y) => (log ? Math.log10(y) : y);
      const values = lines.flatMap((line) => inside(line.points).map((point) => point[1])).filter((y) => !log || y > 0);
      if (!values.length) { this.scale = null; return; }
      const late = log || state.range ? values : lines.flatMap((line) => line.points.filter(([x]) => x >= first + (last - first) * 0.03))
        .map((point) => point[1]);
      let [low, high] = this.limits(values, lines.flatMap((line) => inside(line.soft).map((point) => point[1])), late);
      [low, high] = [turn(low), turn(high)];
      const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      [low, high] = [low - margin, high + margin];
      const x = (value) => area.left + (area.right - area.left) * (last > first ? (value - first) / (last - first) : 0.5);
      const y = (value) => area.bottom - (area.bottom - area.top) * (turn(value) - low) / (high - low);
      this.scale = { x, y, first, last, area, lines, width, log, low, high };
      this.axes();
      this.marks();
      const id = "clip-" + data.charts.indexOf(this.spec);
      this.svg.append(make("svg:clipPath", { id }, make("svg:rect", { x: area.left, y: area.top - 4,
        width: area.right - area.left, height: area.bottom - area.top + 6 })));
      const group = make("svg:g", { "clip-path": `url(#${id})` });
      for (const line of lines) this.line(group, line);
      this.svg.append(group);
      this.cursor = make("svg:g", {});
      this.svg.append(this.cursor);
    }

    // One spike must not flatten the rest: the most is that of usual values, unless little lies beyond. A loss is shown with
    // all its spikes, but without its first fall.
    limits(values, soft, late) {
      const sorted = [...values].sort((a, b) => a - b), at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
      const low = sorted[0], high = sorted[sorted.length - 1], usual = at(0.985);
      if (this.wide && late.length >= 50) {
        const most = late.reduce((a, b) => Math.max(a, b)), least = late.reduce((a, b) => Math.min(a, b));
        return high - low > 2.5 * (most - least) ? [low, most + (most - least) * 0.25] : [low, high];
      }
      if (this.wide || sorted.length < 50 || high - low < 3 * (usual - at(0.015))) return [low, high];
      return [Math.max(low, at(0.015) - (usual - at(0.015))), Math.max(usual * 1.2, ...soft.slice(Math.floor(soft.length / 20)))];
    }

    axes() {
      const { x, first, last, area, log, low, high } = this.scale;
      const height = area.bottom - area.top;
      for (const tick of ticks(low, high, this.wide ? 6 : 4)) {
        const at = area.bottom - height * (tick - low) / (high - low);
        this.svg.append(make("svg:line", { x1: area.left, x2: area.right, y1: at, y2: at, stroke: "var(--hair)" }));
        this.svg.append(make("svg:text", { x: area.left - 8, y: at + 4, "text-anchor": "end" }, show(log ? 10 ** tick : tick)));
      }
      for (const tick of ticks(first, last, Math.max(2, Math.floor((area.right - area.left) / (state.axis === "step" ? 65 : 80))))) {
        if (state.axis === "step" && !Number.isInteger(tick)) continue;
        this.svg.append(make("svg:line", { x1: x(tick), x2: x(tick), y1: area.bottom, y2: area.bottom + 4, stroke: "var(--line)" }));
        this.svg.append(make("svg:text", { x: x(tick), y: area.bottom + 17, "text-anchor": "middle" }, show(tick)));
      }
      this.svg.append(make("svg:line", { x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom, stroke: "var(--line)" }));
    }

    marks() {
      const { x, first, last, area } = this.scale;
      for (const mark of data.marks) {
        const at = place(mark.step);
        if (state.hidden.has(mark.kind) || at < first || at > last) continue;
        const short = mark.kind === "save";
        this.svg.append(make("svg:line", { x1: x(at), x2: x(at), y1: short ? area.bottom - 7 : area.top, y2: area.bottom,
          stroke: shade(SHADES[mark.kind] || "grey"), "stroke-width": short ? 1.5 : 1.2, "stroke-dasharray": short ? "" : "3 3",
          opacity: short ? 0.9 : 0.75, class: "mark" }));
      }
    }

    line(group, line) {
      const { x, y, log } = this.scale;
      const path = (points) => points.filter((point) => !log || point[1] > 0)
        .map((point, number) => (number ? "L" : "M") + x(point[0]).toFixed(1) + " " + y(point[1]).toFixed(1)).join("");
      if (line.name === "validation" || line.points.length === 1) {
        for (const point of line.points) {
          if (log && !(point[1] > 0)) continue;
          group.append(make("svg:circle", { cx: x(point[0]), cy: y(point[1]), r: 3.2, fill: shade(line.shade), stroke: "var(--paper)" }));
        }
        return;
      }
      const common = { fill: "none", stroke: shade(line.shade), "stroke-linejoin": "round" };
      if (line.soft !== line.points) group.append(make("svg:path", { ...common, d: path(line.points), "stroke-width": 1, opacity: 0.28 }));
      group.append(make("svg:path", { ...common, d: path(line.soft), "stroke-width": 1.7 }));
    }

    at(event) {
      if (!this.scale) return null;
      const box = this.svg.getBoundingClientRect(), { area, first, last, width } = this.scale;
      const share = ((event.clientX - box.left) * width / box.width - area.left) / (area.right - area.left);
      return first + Math.min(1, Math.max(0, share)) * (last - first);
    }

    move(event) {
      const at = this.at(event);
      if (at === null) return;
      hover(at, this);
      if (this.from !== null && this.from !== undefined && event.buttons) {
        const { x, area } = this.scale, [a, b] = [x(this.from), x(at)].sort((one, two) => one - two);
        this.cursor.append(make("svg:rect", { x: a, y: area.top, width: b - a, height: area.bottom - area.top, fill: "var(--blue)", opacity: 0.12 }));
      }
    }

    zoom(to) {
      const from = this.from;
      this.from = null;
      if (from === null || from === undefined || to === null) return;
      const [a, b] = [Math.min(from, to), Math.max(from, to)];
      if (b - a > (this.scale.last - this.scale.first) * 0.015) { state.range = [a, b]; drawAll(); }
    }

    // The cross hair at the points nearest to ``at``; words beside it where ``speaks``.
    point(at, speaks) {
      this.tip.style.display = "none";
      if (!this.scale) return;
      this.cursor.replaceChildren();
      if (at === null) return;
      const { x, y, area, lines, width } = this.scale;
      this.cursor.append(make("svg:line", { x1: x(at), x2: x(at), y1: area.top, y2: area.bottom, stroke: "var(--grey)" }));
      const words = [];
      for (const line of lines) {
        let near = 0;
        line.points.forEach((point, number) => { if (Math.abs(point[0] - at) < Math.abs(line.points[near][0] - at)) near = number; });
        const value = line.points[near][1], step = this.spec.lines[lines.indexOf(line)].points[near][0];
        const soft = line.soft[near][1];
        this.cursor.append(make("svg:circle", { cx: x(line.points[near][0]), cy: Math.min(area.bottom, Math.max(area.top, y(soft))), r: 3.5,
          fill: shade(line.shade), stroke: "var(--paper)" }));
        words.push(make("div", {}, make("i", { style: `background:${shade(line.shade)}` }), line.name + " ", make("b", {}, show(value)),
          line.soft !== line.points ? ` (smoothed ${show(soft)})` : "", words.length ? "" : `, step ${step}`));
      }
      if (!speaks) return;
      const reach = (this.scale.last - this.scale.first) * 5 / (area.right - area.left);
      for (const mark of data.marks) {
        if (!state.hidden.has(mark.kind) && Math.abs(place(mark.step) - at) <= reach && words.length < 8) {
          words.push(make("div", {}, make("i", { style: `background:${shade(SHADES[mark.kind] || "grey")}` }), make("b", {}, mark.kind), ` step ${mark.step} ${mark.text}`));
        }
      }
      this.tip.replaceChildren(...words);
      this.tip.style.display = "block";
      const box = this.svg.getBoundingClientRect(), left = x(at) * box.width / width;
      this.tip.style.top = this.head.offsetHeight + 12 + "px";
      this.tip.style.left = Math.max(0, left + 14 + this.tip.offsetWidth > box.width ? left - 14 - this.tip.offsetWidth : left + 14) + "px";
    }
  }

  const charts = data.charts.map((spec) => new Chart(spec));
  const drawAll = () => { hover(null, null); for (const chart of charts) chart.draw(); };
  function hover(at, speaker) { for (const chart of charts) if (chart.cursor) chart.point(at, chart === speaker); }

  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const home = document.getElementById("charts");
  if (!home) return;
  home.append(...charts.map((chart) => chart.box));
  const on = (name, event, act) => document.getElementById(name).addEventListener(event, (each) => { act(each.target); drawAll(); });
  on("smooth", "input", (input) => { state.smooth = Number(input.value); });
  on("logarithmic", "change", (input) => { state.log = input.checked; });
  on("axis", "change", (input) => { state.axis = input.value; state.range = null; });
  const kinds = [...new Set(data.marks.map((mark) => mark.kind))];
  document.getElementById("marks").append(...kinds.map((kind) => {
    const button = make("button", { type: "button", "aria-pressed": "true" }, make("i", { style: `background:${shade(SHADES[kind] || "grey")}` }), kind.replace("_", " "));
    button.addEventListener("click", () => {
      const hides = !state.hidden.has(kind);
      if (hides) state.hidden.add(kind); else state.hidden.delete(kind);
      button.setAttribute("aria-pressed", String(!hides));
      drawAll();
    });
    return button;
  }));
  drawAll();
  new ResizeObserver(drawAll).observe(home);
  addEventListener("beforeprint", drawAll);
})();
