// The page of `python -m dojo.watch`: the list of runs, and what is asked of those that are ticked.

import { ask, byId, duration, el, number, picture, query, repeat, sure, tell } from "/page.js";
import { Charts } from "/charts.js";

const COLOURS = 10;
const MOST_DETAILS = 6; // runs whose logs and pictures are shown

let runs = [];
let chosen = new URLSearchParams(location.hash.slice(1)).getAll("run");
let first = chosen.length === 0; // nothing was chosen yet: the newest run is shown
const colours = new Map(); // name of a run: number of its colour, for as long as the page is open
const details = new Map();
const curves = new Map();
const charts = new Charts(byId("charts"));

const colourOf = (name) => {
  if (!colours.has(name)) colours.set(name, colours.size % COLOURS);
  return `c${colours.get(name)}`;
};

// -- the list ----------------------------------------------------------------------------------

const rows = new Map();

function row(name) {
  const box = el("input", { type: "checkbox", onchange: () => choose(name, box.checked) });
  const parts = {
    box, swatch: el("span.swatch"), state: el("span.state"), steps: el("span"),
    bar: el("progress", { "aria-label": `steps of ${name}` }),
    loss: el("span"), left: el("span"),
  };
  parts.line = el("tr", {},
    el("td", {}, el("label", {}, box, parts.swatch, name)),
    el("td", {}, parts.state),
    el("td.steps", {}, parts.steps, parts.bar),
    el("td", { "data-name": "loss" }, parts.loss),
    el("td", { "data-name": "left" }, parts.left));
  return parts;
}

function showList() {
  const names = new Set(runs.map((run) => run.name));
  for (const [name, parts] of rows) if (!names.has(name)) { parts.line.remove(); rows.delete(name); }
  runs.forEach((run, i) => {
    if (!rows.has(run.name)) rows.set(run.name, row(run.name));
    const parts = rows.get(run.name);
    const ticked = chosen.includes(run.name);
    parts.box.checked = ticked;
    parts.swatch.className = `swatch ${ticked ? colourOf(run.name) : ""}`;
    parts.state.className = `state ${run.state}`;
    parts.state.textContent = run.state;
    parts.steps.textContent = `${number(run.step)}${run.num_steps ? ` of ${number(run.num_steps)}` : ""}`;
    parts.bar.hidden = !run.num_steps;
    parts.bar.max = run.num_steps || 1;
    parts.bar.value = run.step;
    parts.loss.textContent = number(run.loss) || "–";
    parts.left.textContent = run.seconds_left === null ? "–" : duration(run.seconds_left);
    const table = byId("runs");
    if (table.children[i] !== parts.line) table.insertBefore(parts.line, table.children[i] || null);
  });
}

function choose(name, on) {
  first = false;
  chosen = chosen.filter((one) => one !== name);
  if (on) chosen.push(name);
  history.replaceState(null, "", `#${query({ run: chosen })}`);
  showList();
  drawCharts();
  showDetails();
  wake();
}

// -- curves ------------------------------------------------------------------------------------

let kinds = [];

async function readCurves() {
  if (!chosen.length) return false;
  const have = chosen.filter((name) => curves.has(name)).map((name) => `${name}:${curves.get(name).version}`);
  const points = chosen.length > 4 ? 140 : 300;
  const answer = await ask(`curves?${query({ run: chosen, points, have })}`);
  for (const [name, found] of Object.entries(answer.runs)) curves.set(name, found);
  kinds = answer.charts;
  const shares = chosen.filter((name) => curves.has(name)).map((name) => curves.get(name).read);
  const share = shares.reduce((sum, one) => sum + one, 0) / Math.max(1, shares.length);
  byId("reading").hidden = !answer.reading;
  byId("reading").textContent = `reading rows: ${Math.floor(100 * share)} %`;
  if (Object.keys(answer.runs).length) drawCharts();
  return answer.reading;
}

function drawCharts() {
  const shown = chosen.filter((name) => curves.has(name));
  const drawn = kinds.map((kind) => ({
    title: kind.title,
    smooth: kind.smooth,
    named: shown.length > 1 || Object.keys(kind.curves).length > 1,
    lines: shown.flatMap((name) => Object.entries(kind.curves)
      .filter(([key]) => key in curves.get(name).curves)
      .map(([key, label], i) => ({
        ...curves.get(name).curves[key],
        name: shown.length > 1 ? (Object.keys(kind.curves).length > 1 ? `${name}, ${label}` : name) : label,
        style: shown.length > 1 ? `${colourOf(name)} d${i % 4}` : `c${i % COLOURS}`,
      }))),
  }));
  charts.show(drawn.filter((chart) => chart.lines.length));
}

// -- what is known of each run -------------------------------------------------------------------

async function readDetails() {
  const names = chosen.slice(0, MOST_DETAILS);
  const found = await Promise.all(names.map((name) => ask(`run?${query({ run: name })}`).catch(() => null)));
  names.forEach((name, i) => found[i] && details.set(name, found[i]));
  showDetails();
}

const cards = new Map();

function showDetails() {
  const shown = chosen.filter((name) => details.has(name)).slice(0, MOST_DETAILS);
  keep(cards, shown, byId("details"), card);
  for (const name of shown) cards.get(name).update(details.get(name));
  showPictures(shown);
  showOptions(shown);
}

/** Holds one block for each name in a place, in their order; blocks that stay are not touched. */
function keep(blocks, names, place, make) {
  for (const [name, block] of blocks) {
    if (!names.includes(name)) { block.node.remove(); blocks.delete(name); }
  }
  names.forEach((name, i) => {
    if (!blocks.has(name)) blocks.set(name, make(name));
    const node = blocks.get(name).node;
    if (place.children[i] !== node) place.insertBefore(node, place.children[i] || null);
  });
}

function card(name) {
  const words = el("p");
  const buttons = ["stop", "save", "sample"].map((what) => el(
    `button${what === "stop" ? ".stop" : ""}`,
    { type: "button", "data-what": what, onclick: () => order(name, what) },
    { stop: "Stop", save: "Save a checkpoint", sample: "Draw now" }[what]));
  const control = el("div.buttons", { role: "group", "aria-label": `control of ${name}` }, buttons);
  const phases = el("div.scroll");
  const title = el("p.soft");
  const log = el("pre.wrap", { tabindex: "0", "aria-label": `log of ${name}` });
  const node = el("article", {}, el("h3", {}, el(`span.swatch.${colourOf(name)}`), name), words, control, phases, title, log);
  function update(run) {
    const left = run.seconds_left === null ? "" : `, about ${duration(run.seconds_left)} left`;
    words.textContent = `${run.state}, step ${number(run.step)}${run.num_steps ? ` of ${number(run.num_steps)}` : ""}${left}`;
    control.hidden = run.state !== "running";
    const whole = Object.values(run.phases).reduce((sum, one) => sum + one, 0);
    phases.replaceChildren(el("table", {}, el("caption", { hidden: "" }, "seconds in each phase"),
      Object.entries(run.phases).filter(([, seconds]) => seconds > 0).map(([phase, seconds]) => {
        const bar = el(`div.bar`);
        bar.style.width = `${(100 * seconds) / whole}%`;
        return el("tr", {}, el("th", { scope: "row" }, phase.replaceAll("_", " ")),
          el("td.number", {}, duration(seconds)),
          el("td.number", {}, `${Math.round((100 * seconds) / whole)} %`), el("td.wide", {}, bar));
      })));
    const text = run.log.lines.join("\n");
    title.textContent = run.log.file || "no log in the folder";
    log.hidden = !text;
    if (log.textContent !== text) {
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
      log.textContent = text;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  }
  return { node, update };
}

async function order(name, what) {
  const stop = `Stop ${name}? It writes a checkpoint after this step and ends. The same command with --resume_from_checkpoint latest goes on.`;
  if (what === "stop" && !(await sure(stop, "Stop the run"))) return;
  try {
    await ask("control", { run: name, what });
    tell({ stop: `${name} was asked to stop`, save: `${name} was asked for a checkpoint`, sample: `${name} was asked to draw` }[what] + "; it does so after its next step");
    quiet = Date.now() + 8000;
  } catch (error) {
    tell(error.message, true);
  }
}

// -- pictures ------------------------------------------------------------------------------------

const albums = new Map();

function showPictures(shown) {
  const sets = shown.flatMap((name) => Object.keys(details.get(name).pictures).map((set) => JSON.stringify([name, set])));
  keep(albums, sets, byId("pictures"), album);
  for (const key of sets) {
    const [name, set] = JSON.parse(key);
    albums.get(key).update(details.get(name).pictures[set]);
  }
  byId("pictures-section").hidden = !sets.length;
}

function album(key) {
  const [name, set] = JSON.parse(key);
  const slider = el("input", { type: "range", min: 0, "aria-label": `step of the pictures of ${name}`, oninput: () => show(true) });
  const told = el("output");
  const slide = el("div.slide", {}, slider, told);
  const grid = el("div.pictures");
  const node = el("article", {}, el("h3", {}, el(`span.swatch.${colourOf(name)}`), `${name}: ${set}`), slide, grid);
  let steps = [];
  let drawn = "";
  function update(found) {
    const atEnd = !steps.length || Number(slider.value) === steps.length - 1;
    const before = steps[Number(slider.value)];
    steps = found;
    slider.max = steps.length - 1;
    slider.value = atEnd ? steps.length - 1 : Math.max(0, steps.indexOf(before));
    slide.hidden = steps.length < 2;
    show(false);
  }
  async function show(moved) {
    const step = steps[Number(slider.value)];
    told.textContent = `step ${step}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    const found = await ask(`pictures?${query({ run: name, set, step })}`).catch(() => null);
    const text = JSON.stringify([step, found && found.pictures]);
    if (!found || text === drawn || step !== steps[Number(slider.value)]) return;
    drawn = text;
    grid.replaceChildren(...found.pictures.map((one) => picture(
      `picture?${query({ run: name, file: one.file })}`, one.label)));
  }
  return { node, update };
}

// -- options -------------------------------------------------------------------------------------

let optionsDrawn = "";

function showOptions(shown) {
  const tables = shown.map((name) => ({ ...details.get(name).facts, ...details.get(name).options }));
  const only = byId("different").checked && shown.length > 1;
  byId("different").disabled = shown.length < 2;
  const keys = [...new Set(tables.flatMap((table) => Object.keys(table)))];
  const lines = keys.map((key) => {
    const values = tables.map((table) => table[key] ?? "–");
    return { key, values, differs: new Set(values).size > 1 };
  }).filter((line) => line.differs || !only);
  const text = JSON.stringify([shown, lines]);
  if (text === optionsDrawn) return;
  optionsDrawn = text;
  const head = el("tr", {}, el("th", { scope: "col" }, "option"), shown.map((name) => el("th", { scope: "col" }, name)));
  const body = lines.map((line) => el("tr", {}, el("th", { scope: "row" }, line.key),
    line.values.map((value) => el(line.differs ? "td.differs" : "td", {}, value))));
  byId("options").replaceChildren(lines.length ? el("table", {}, el("thead", {}, head), el("tbody", {}, body)) : el("p.soft", {}, only ? "nothing differs" : "no run is ticked"));
}

// -- the pulse -----------------------------------------------------------------------------------

let quiet = 0; // until when the last answer to a button stays to be read
let lastDetails = 0;
let wakeUp = () => {};
const wake = () => { lastDetails = 0; wakeUp(); };

async function list() {
  const answer = await ask("runs");
  runs = answer.runs;
  byId("folder").textContent = answer.folder;
  if (first && runs.length) {
    const running = runs.filter((run) => run.state === "running").map((run) => run.name);
    chosen = running.length ? running.slice(0, 4) : [runs[0].name];
    first = false;
  }
  showList();
  if (Date.now() > quiet) {
    const count = runs.filter((run) => run.state === "running").length;
    tell(runs.length ? `${runs.length} run${runs.length > 1 ? "s" : ""}, ${count} at work` : "no run here yet");
  }
}

byId("different").addEventListener("change", showDetails);
repeat(async () => {
  await list();
  const reading = await readCurves();
  if (Date.now() - lastDetails > 3500) {
    lastDetails = Date.now();
    await readDetails();
  }
  await Promise.race([
    new Promise((resolve) => setTimeout(resolve, reading ? 50 : 2000)),
    new Promise((resolve) => { wakeUp = resolve; }),
  ]);
  return 0;
});
