(() => {
  "use strict";
  // Curves that answer: values under the pointer, zoom by selection, smoothing, a log axis. What is drawn is data, never code.
  const TOP = 10, RIGHT = 12, BOTTOM = 38, LEFT = 52, HEIGHT = 220;
  const STEPS = [1, 2, 2.5, 5, 10];

  const ticks = (low, high, most, whole) => {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    let step = power * STEPS.find((f) => power * f >= rough * (1 - 1e-9));
    if (whole) step = Math.max(1, Math.ceil(step));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const f of [1, 2, 5]) if (f * 10 ** p >= low && f * 10 ** p <= high) found.push(f * 10 ** p);
    const many = found.length > 8 ? found.filter((v) => /^1(e|0*$|$)/.test(String(v)) || Math.log10(v) % 1 === 0) : found;
    return found.length < 2 ? ticks(low, high, 4, false) : many;
  };
  const tidy = (text) => text.replace(/\.?0+(e|$)/, "$1").replace("e+", "e");
  const label = (value) => {
    const size = Math.abs(value);
    if (size >= 1e4) return Math.round(value).toLocaleString("en-US");
    return size && size < 1e-3 ? tidy(value.toExponential(2)) : String(Number(value.toPrecision(5)));
  };
  const written = (value, share) => (share ? `${(100 * value).toFixed(1)}%` : label(value));

  const smoothed = (values, percent) => {
    const keep = 1 - 1 / Math.max((values.length * percent) / 100, 1);
    let total = 0, weight = 0;
    return values.map((value) => {
      total = keep * total + value;
      weight = keep * weight + 1;
      return total / weight;
    });
  };

  class Plot {
    constructor(figure, group) {
      this.figure = figure;
      this.group = group;
      this.data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      this.still = figure.querySelector("svg");
      this.space = this.still.namespaceURI;
      this.box = document.createElement("div");
      this.box.className = "canvas";
      this.box.tabIndex = 0;
      this.box.setAttribute("role", "application");
      this.box.setAttribute("aria-label", `${this.still.getAttribute("aria-label")}. Arrow keys read values, plus and minus zoom, 0 shows all.`);
      this.still.replaceWith(this.box);
      this.readout = document.createElement("p");
      this.readout.className = "readout";
      this.readout.setAttribute("aria-live", "polite");
      this.box.after(this.readout);
      this.at = null;
      this.from = null;
      this.listen();
    }

    get isLogX() { return this.data.log_x; }

    all() { return this.data.curves.flatMap((c) => c.x); }

    span() {
      const values = this.all(), low = Math.min(...values), high = Math.max(...values);
      if (this.isLogX) {
        const room = high > low ? (high / low) ** 0.02 : 2;
        return [low / room, high * room];
      }
      const room = (high - low) * 0.02 || Math.abs(high) * 0.1 || 1;
      return [low - room, high + room];
    }

    // The part of x that is shown: zoom of the group where its plots have the same axis
    view() {
      const zoom = this.group.zoom[this.data.x];
      return zoom || this.span();
    }

    lines() {
      const percent = this.group.smoothing, [low, high] = this.view();
      return this.data.curves.map((curve) => {
        const over = curve.smooth && percent > 0 ? smoothed(curve.y, percent) : null;
        const kept = curve.x.map((x, i) => [x, curve.y[i], over ? over[i] : curve.y[i]]);
        // one beyond each end, so that a line runs out of the picture
        const inside = kept.filter(([x], i) => {
          const before = i ? kept[i - 1][0] : x, after = i + 1 < kept.length ? kept[i + 1][0] : x;
          return Math.max(x, before, after) >= low && Math.min(x, before, after) <= high;
        });
        return { curve, over: Boolean(over), points: curve.style === "dots" ? kept : inside };
      });
    }

    draw() {
      const width = Math.max(this.box.clientWidth, 200);
      const [low, high] = this.view(), lines = this.lines();
      const seen = lines.flatMap((l) => l.points.filter(([x]) => x >= low && x <= high).flatMap(([, y, s]) => (l.over ? [y, s] : [y])));
      const values = seen.length ? seen : lines.flatMap((l) => l.points.map(([, y]) => y));
      let bottom = Math.min(...values), top = Math.max(...values);
      const isLog = this.group.log && Math.min(...this.data.curves.flatMap((c) => c.y)) > 0;
      if (isLog) {
        const room = top > bottom ? (top / bottom) ** 0.06 : 2;
        [bottom, top] = [bottom / room, top * room];
      } else {
        const room = (top - bottom) * 0.06 || Math.abs(top) * 0.1 || 1;
        [bottom, top] = [bottom - room, top + room];
      }
      const place = (value, a, b, from, to, log) => {
        const f = log ? Math.log : (v) => v;
        return from + ((to - from) * (f(value) - f(a))) / (f(b) - f(a));
      };
      this.x = (v) => place(v, low, high, LEFT, width - RIGHT, this.isLogX);
      this.y = (v) => place(v, bottom, top, HEIGHT - BOTTOM, TOP, isLog);
      this.back = (pixel) => {
        const share = (pixel - LEFT) / (width - RIGHT - LEFT);
        return this.isLogX ? low * (high / low) ** share : low + share * (high - low);
      };
      this.width = width;
      const svg = this.make("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
      for (const value of isLog ? logTicks(bottom, top) : ticks(bottom, top, 5, false)) {
        this.make("path", { class: "grid", d: `M${LEFT} ${this.y(value)}H${width - RIGHT}` }, svg);
        this.make("text", { x: LEFT - 6, y: this.y(value) + 4, "text-anchor": "end" }, svg, label(value));
      }
      const whole = this.all().every(Number.isInteger), most = width < 340 ? 4 : 6;
      const given = this.data.ticks && !this.group.zoom[this.data.x];
      for (const value of given ? this.data.ticks : this.isLogX ? logTicks(low, high) : ticks(low, high, most, whole))
        this.make("text", { x: this.x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, svg, label(value));
      this.make("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, svg, this.data.x);
      const inner = this.make("svg", { x: LEFT - 4, y: 0, width: width - RIGHT - LEFT + 8, height: HEIGHT - BOTTOM + 4 }, svg);
      const shift = this.make("g", { transform: `translate(${4 - LEFT} 0)` }, inner);
      for (const each of lines) this.curve(shift, each);
      this.marks = this.make("g", {}, shift);
      this.box.replaceChildren(svg);
      if (this.at !== null) this.show(this.at);
    }

    curve(into, { curve, over, points }) {
      const color = `var(--c${Number(curve.color)})`, strong = curve.strong ? 2.4 : 1.6;
      const path = (which) => "M" + points.map((p) => `${this.x(p[0]).toFixed(1)} ${this.y(p[which]).toFixed(1)}`).join("L");
      const line = (which, width, opacity) =>
        this.make("path", { d: path(which), fill: "none", "stroke-width": width, opacity, style: `stroke: ${color}` }, into);
      const discs = (radius, opacity) => {
        for (const [x, y] of points)
          this.make("circle", { cx: this.x(x), cy: this.y(y), r: radius, opacity, style: `fill: ${color}` }, into);
      };
      if (!points.length) return;
      if (curve.style === "dots") discs(2, 0.7);
      else if (curve.style === "points" || points.length === 1) { line(1, 1.2, 1); discs(3, 1); }
      else if (over) { line(1, 0.8, 0.35); line(2, strong, 1); }
      else line(1, strong, 1);
    }

    // Values of every curve at the place that is nearest to x
    show(x) {
      const said = [];
      let at = null;
      const lines = this.lines();
      for (const { points } of lines)
        for (const [value] of points) if (at === null || Math.abs(value - x) < Math.abs(at - x)) at = value;
      if (at === null) return;
      this.at = at;
      this.marks.replaceChildren();
      this.make("path", { class: "cursor", d: `M${this.x(at)} ${TOP}V${HEIGHT - BOTTOM}` }, this.marks);
      for (const { curve, over, points } of lines) {
        const found = points.find(([value]) => value === at);
        if (!found) continue;
        this.make("circle", { cx: this.x(at), cy: this.y(found[2]), r: 3.5, style: `fill: var(--c${Number(curve.color)})` }, this.marks);
        const mean = over ? ` (mean ${written(found[2], this.data.share)})` : "";
        said.push(`${curve.label ? `${curve.label} ` : ""}${written(found[1], this.data.share)}${mean}`);
      }
      this.readout.textContent = `${this.data.x} ${label(at)}: ${said.join(", ")}`;
    }

    hide() {
      this.at = null;
      if (this.marks) this.marks.replaceChildren();
      this.readout.textContent = "";
    }

    step(by) {
      const [low, high] = this.view();
      const places = [...new Set(this.all())].filter((x) => x >= low && x <= high).sort((a, b) => a - b);
      if (!places.length) return;
      const now = this.at === null ? (by > 0 ? -1 : places.length) : places.findIndex((x) => x >= this.at);
      this.show(places[Math.min(places.length - 1, Math.max(0, now + by))]);
    }

    zoomBy(factor) {
      const [low, high] = this.view(), middle = this.at === null ? (low + high) / 2 : this.at;
      const [all, end] = this.span();
      const next = [Math.max(all, middle - (middle - low) * factor), Math.min(end, middle + (high - middle) * factor)];
      this.group.zoomTo(this.data.x, next[1] - next[0] >= end - all ? null : next);
    }

    listen() {
      const place = (event) => event.clientX - this.box.getBoundingClientRect().left;
      this.box.addEventListener("pointerdown", (event) => {
        if (event.button === 0) this.from = place(event);
      });
      this.box.addEventListener("pointermove", (event) => {
        const now = place(event);
        this.show(this.back(now));
        if (this.from === null || event.pointerType === "touch") return;
        const [a, b] = [Math.min(this.from, now), Math.max(this.from, now)];
        this.make("rect", { class: "chosen", x: a, y: TOP, width: b - a, height: HEIGHT - BOTTOM - TOP }, this.marks);
      });
      const end = (event) => {
        if (this.from === null) return;
        const now = place(event), [a, b] = [Math.min(this.from, now), Math.max(this.from, now)];
        this.from = null;
        if (b - a > 6 && event.pointerType !== "touch") this.group.zoomTo(this.data.x, [this.back(a), this.back(b)]);
      };
      this.box.addEventListener("pointerup", end);
      this.box.addEventListener("pointerleave", (event) => { end(event); if (document.activeElement !== this.box) this.hide(); });
      this.box.addEventListener("dblclick", () => this.group.zoomTo(this.data.x, null));
      this.box.addEventListener("blur", () => this.hide());
      this.box.addEventListener("keydown", (event) => {
        const keys = {
          ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1), "+": () => this.zoomBy(0.5), "=": () => this.zoomBy(0.5),
          "-": () => this.zoomBy(2), 0: () => this.group.zoomTo(this.data.x, null), Escape: () => this.group.zoomTo(this.data.x, null),
        };
        if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        keys[event.key]();
      });
    }

    make(tag, attributes, parent, text) {
      const element = document.createElementNS(this.space, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      if (text !== undefined) element.textContent = text;
      if (parent) parent.append(element);
      return element;
    }
  }

  // All curves of a page: they share smoothing, the log axis, and the part of an axis that is shown
  class Group {
    constructor(figures) {
      this.zoom = {};
      this.log = false;
      this.smoothing = 5;
      this.plots = figures.map((figure) => new Plot(figure, this));
      if (!this.plots.length) return;
      this.tools(figures[0].parentElement);
      this.plots.forEach((plot) => plot.draw());
      let last = document.documentElement.clientWidth;
      addEventListener("resize", () => {
        if (document.documentElement.clientWidth === last) return;
        last = document.documentElement.clientWidth;
        this.draw();
      });
    }

    draw() { this.plots.forEach((plot) => plot.draw()); }

    zoomTo(axis, view) {
      if (view) this.zoom[axis] = view;
      else delete this.zoom[axis];
      this.all.disabled = !Object.keys(this.zoom).length;
      this.draw();
    }

    tools(before) {
      const bar = document.createElement("div"), slider = document.createElement("input"), log = document.createElement("input");
      bar.className = "tools";
      const named = (words, control) => {
        const name = document.createElement("label");
        name.append(words, control);
        bar.append(name);
      };
      Object.assign(slider, { type: "range", min: 0, max: 25, step: 1, value: this.smoothing });
      slider.setAttribute("aria-valuetext", `over ${this.smoothing} % of the points`);
      slider.addEventListener("input", () => {
        this.smoothing = Number(slider.value);
        slider.setAttribute("aria-valuetext", `over ${this.smoothing} % of the points`);
        this.draw();
      });
      log.type = "checkbox";
      log.addEventListener("change", () => { this.log = log.checked; this.draw(); });
      if (this.plots.some((plot) => plot.data.curves.some((curve) => curve.smooth))) named("smoothing ", slider);
      named("log axis ", log);
      this.all = document.createElement("button");
      Object.assign(this.all, { type: "button", textContent: "show all", disabled: true });
      this.all.addEventListener("click", () => { this.zoom = {}; this.all.disabled = true; this.draw(); });
      bar.append(this.all);
      const hint = document.createElement("span");
      hint.textContent = "drag over a curve to zoom";
      bar.append(hint);
      before.before(bar);
    }

    get isInUse() { return Boolean(Object.keys(this.zoom).length) || this.plots.some((plot) => plot.at !== null); }
  }

  const group = new Group([...document.querySelectorAll("figure[data-plot]")]);

  // A run that goes on: look again now and then, unless somebody is reading; and say when nothing was written for long
  const live = document.querySelector("[data-written]");
  if (live) {
    const written = Number(live.dataset.written) * 1000, every = Number(live.dataset.every) * 1000;
    const pause = live.querySelector("button"), note = live.querySelector(".silence");
    let paused = false;
    pause.hidden = false;
    pause.addEventListener("click", () => {
      paused = !paused;
      pause.setAttribute("aria-pressed", String(paused));
    });
    const look = () => {
      const age = Date.now() - written;
      if (age > 6 * every + 60000) {
        const chip = document.querySelector(".chip.running");
        if (chip) { chip.className = "chip"; chip.textContent = "no news"; }
        note.textContent = `Nothing was written for ${Math.round(age / 60000)} minutes: the run takes long over a step, or its process is gone.`;
      }
    };
    look();
    setInterval(() => {
      look();
      const busy = paused || group.isInUse || document.hidden || String(getSelection());
      if (!busy) location.reload();
    }, Number(live.dataset.refresh) * 1000);
  }
})();
