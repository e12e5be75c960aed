// The page of `demo.py --web`: a form, and below it what was drawn, the newest first.

import { ask, byId, el, number, picture, query, repeat, tell } from "/page.js";

const NUMBERS = ["num_inference_steps", "guidance_scale", "width", "height"];
let about = null;
let sliders = [];

// -- the form ----------------------------------------------------------------------------------

async function fill() {
  about = await ask("model");
  const loras = about.loras.length ? `, with ${about.loras.join(", ")}` : "";
  byId("model").textContent = about.model + loras;
  for (const name of NUMBERS) byId(name).value = about.drawing[name] ?? "";
  byId("negative_prompt").value = about.drawing.negative_prompt ?? "";
  byId("seed").value = about.seed ?? "";
  byId("prompt").value = about.prompts[0] ?? "";
  byId("choices").hidden = !about.prompts.length;
  byId("choice").append(...about.prompts.map((text) => el("option", { value: text }, text)));
  byId("scales").hidden = !about.loras.length;
  sliders = about.loras.map(slider);
  byId("draw").disabled = false;
  tell("ready");
}

function slider(name, i) {
  const start = about.scales[i];
  const id = `scale-${i}`;
  const told = el("output", { for: id }, start.toFixed(2));
  const range = el("input", {
    id, type: "range", min: Math.min(0, start), max: Math.max(2, start), step: 0.05, ".value": start,
    oninput: () => { told.textContent = Number(range.value).toFixed(2); },
  });
  byId("scales").append(el("label", { for: id }, `Scale of ${name}`), el("div.slide", {}, range, told));
  return range;
}

byId("choice").addEventListener("change", () => { byId("prompt").value = byId("choice").value; });

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = {
    prompt: byId("prompt").value,
    negative_prompt: byId("negative_prompt").value,
    scales: sliders.map((range) => Number(range.value)),
  };
  for (const name of [...NUMBERS, "seed"]) {
    if (byId(name).value !== "") body[name] = Number(byId(name).value);
  }
  try {
    const { job } = await ask("draw", body);
    tell(`picture ${job} is asked for`);
    wakeUp();
  } catch (error) {
    tell(error.message, true);
  }
});

// -- what was drawn ----------------------------------------------------------------------------

const cards = new Map();

function card(job) {
  const words = el("p.soft", { role: "status" });
  const bar = el("progress", { max: 1, "aria-label": `steps of picture ${job.number}` });
  const cancel = el("button", { type: "button", onclick: () => ask("cancel", { job: job.number }) }, "Cancel");
  const busy = el("div.buttons", {}, bar, cancel);
  const pair = el("div.pair");
  const scales = job.scales.length ? `, scale ${job.scales.map(number).join(", ")}` : "";
  const node = el("article", {},
    el("h3", {}, job.prompt || "(no prompt)"),
    el("p.soft", {}, `picture ${job.number}, seed ${job.seed}${scales}`), words, busy, pair,
    el("div.buttons", {},
      el("button", { type: "button", onclick: () => { byId("seed").value = job.seed; byId("prompt").value = job.prompt; byId("prompt").focus(); } }, "Take prompt and seed")));
  const shown = new Set();
  function update(now) {
    const working = now.state === "waiting" || now.state === "drawing";
    busy.hidden = !working;
    bar.value = now.done / Math.max(1, now.steps);
    words.textContent = now.state === "drawing" ? `step ${now.done} of ${now.steps}`
      : now.state === "done" ? `${now.seconds} s` : `${now.state} ${now.error}`;
    words.classList.toggle("warn", now.state === "failed");
    for (const [side, { there, command }] of Object.entries(now.sides)) {
      if (!there || shown.has(side)) continue;
      shown.add(side);
      const name = side === "base" ? "base" : "with LoRA";
      pair.append(picture(`picture?${query({ job: job.number, side })}`, `${name}: ${job.prompt}`, name));
      node.append(again(name, command));
    }
  }
  return { node, update };
}

function again(name, command) {
  const copy = el("button", {
    type: "button", "aria-label": `copy the command of the picture ${name}`,
    onclick: async () => {
      await navigator.clipboard.writeText(command);
      tell("the command is copied");
    },
  }, "Copy");
  return el("details", {}, el("summary", {}, `command, ${name}`), el("pre.wrap", {}, command), copy);
}

let wakeUp = () => {};

repeat(async () => {
  if (!about) await fill();
  const { jobs } = await ask("jobs");
  const place = byId("jobs");
  const numbers = new Set(jobs.map((job) => job.number));
  for (const [number, old] of cards) if (!numbers.has(number)) { old.node.remove(); cards.delete(number); }
  jobs.forEach((job, i) => {
    if (!cards.has(job.number)) cards.set(job.number, card(job));
    const { node, update } = cards.get(job.number);
    update(job);
    if (place.children[i] !== node) place.insertBefore(node, place.children[i] || null);
  });
  const busy = jobs.some((job) => job.state === "waiting" || job.state === "drawing");
  await Promise.race([
    new Promise((resolve) => setTimeout(resolve, busy ? 400 : 3000)),
    new Promise((resolve) => { wakeUp = resolve; }),
  ]);
  return 0;
});
