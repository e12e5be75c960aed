// Curves as SVG whose colours come from the style sheet, so that light and dark need no redrawing.

import { el, number } from "/page.js";

const WIDTH = 380, HEIGHT = 200;
const LEFT = 54, RIGHT = 16, TOP = 8, BOTTOM = 24;
const SPACE = "http://www.w3.org/2000/svg";

function svg(name, attributes, text) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Round numbers from `low` or below to `high` or above, about `count` apart. */
function ticks(low, high, count) {
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) {
    const half = (Math.abs(low) || 1) / 2;
    [low, high] = [low - half, high + half];
  }
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((one) => one >= raw * 0.999);
  const from = Math.floor(low / step + 1e-9), to = Math.ceil(high / step - 1e-9);
  return Array.from({ length: to - from + 1 }, (_, k) => (from + k) * step);
}

const range = (numbers) => numbers.reduce(([low, high], one) => [Math.min(low, one), Math.max(high, one)], [Infinity, -Infinity]);

/** A place for charts; only those in sight are drawn. */
export class Charts {
  constructor(place) {
    this.place = place;
    this.charts = new Map();
    this.seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        entry.target.seen = entry.isIntersecting;
        if (entry.isIntersecting) entry.target.draw();
      }
    }, { rootMargin: "200px" });
  }

  show(charts) {
    const titles = charts.map((chart) => chart.title);
    for (const [title, figure] of this.charts) {
      if (!titles.includes(title)) { this.seen.unobserve(figure); figure.remove(); this.charts.delete(title); }
    }
    charts.forEach((chart, i) => {
      if (!this.charts.has(chart.title)) {
        const made = figure(chart.title);
        this.charts.set(chart.title, made);
        this.seen.observe(made);
      }
      const node = this.charts.get(chart.title);
      node.put(chart);
      if (this.place.children[i] !== node) this.place.insertBefore(node, this.place.children[i] || null);
    });
  }
}

/** One chart. Under the pointer the legend tells the values at its step instead of the last ones. */
function figure(title) {
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const legend = el("p.legend");
  const made = el("figure", {}, el("figcaption", {}, title), picture, legend);
  let chart = null, stale = true, place = null;

  made.put = (found) => { chart = found; stale = true; if (made.seen) made.draw(); };

  made.draw = () => {
    if (!stale || !chart) return;
    stale = false;
    const lines = chart.lines.flatMap((line) => (chart.smooth && line.smooth.length
      ? [{ ...line, style: `${line.style} faint` }, { ...line, points: line.smooth }]
      : [line]));
    // Smoothed lines of several runs are seen better without the noise of all of them behind.
    const several = chart.lines.length > 4;
    const drawn = several ? lines.filter((line) => !line.style.endsWith("faint")) : lines;
    place = frame(drawn);
    picture.replaceChildren(...place.parts, ...drawn.flatMap((line) => shape(line, place)));
    tell(null);
  };

  function tell(step) {
    legend.replaceChildren(...(step === null ? [] : [`step ${number(step)}: `]),
      ...chart.lines.map((line) => {
        const value = step === null ? line.last : nearest(chart.smooth && line.smooth.length ? line.smooth : line.points, step);
        const words = chart.named
          ? `${line.name}: ${number(value)}`
          : step === null
            ? `first ${number(line.first)}, last ${number(line.last)}, lowest ${number(line.low)}, highest ${number(line.high)}`
            : number(value);
        return el(`span.key.${line.style.split(" ")[0]}`, {}, words);
      }));
  }

  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM });
  picture.addEventListener("pointermove", (event) => {
    if (!place) return;
    const box = picture.getBoundingClientRect();
    const x = Math.min(WIDTH - RIGHT, Math.max(LEFT, ((event.clientX - box.left) / box.width) * WIDTH));
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    if (!cursor.parentNode) picture.append(cursor);
    tell(place.stepAt(x));
  });
  picture.addEventListener("pointerleave", () => { cursor.remove(); if (place) tell(null); });
  return made;
}

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1; else high = middle;
  }
  const before = points[Math.max(0, low - 1)], after = points[low];
  return Math.abs(before[0] - step) <= Math.abs(after[0] - step) ? before[1] : after[1];
}

/** Axes that hold all lines. */
function frame(lines) {
  const points = lines.flatMap((line) => line.points);
  const [low, high] = range(points.map((point) => point[1]));
  const [from, to] = range(points.map((point) => point[0]));
  const yTicks = ticks(low, high, 4), bottom = yTicks[0], top = yTicks.at(-1);
  const xUnit = (WIDTH - LEFT - RIGHT) / (to - from || 1), yUnit = (HEIGHT - TOP - BOTTOM) / (top - bottom);
  const x = (step) => LEFT + (step - from) * xUnit;
  const y = (value) => TOP + (top - value) * yUnit;
  const parts = yTicks.flatMap((tick) => [
    svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }),
    svg("text", { class: "y", x: LEFT - 6, y: y(tick), dy: 4 }, number(tick)),
  ]);
  for (const tick of ticks(from, to, 4)) {
    if (tick >= from && tick <= to) parts.push(svg("text", { x: x(tick), y: HEIGHT - 6 }, number(tick)));
  }
  return { parts, x, y, stepAt: (place) => from + (place - LEFT) / xUnit };
}

function shape(line, place) {
  const points = line.points.map(([step, value]) => `${place.x(step).toFixed(1)},${place.y(value).toFixed(1)}`);
  const found = [svg("polyline", { class: line.style, points: points.join(" ") })];
  if (points.length > 20) return found;
  return found.concat(line.points.map(([step, value]) => {
    const dot = svg("circle", { class: line.style, cx: place.x(step), cy: place.y(value), r: 2.5 });
    dot.append(svg("title", {}, `${line.name}, step ${number(step)}: ${number(value)}`));
    return dot;
  }));
}
