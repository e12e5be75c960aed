// What both pages need: the token, questions to the server, elements, pictures.
// Texts of a run reach the page as text nodes and attributes alone, never as markup.

const KEY = "dojo-token";

/** Takes the token out of the address, so that it is in no history and no bookmark. */
function takeToken() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (parts.has("token")) {
    sessionStorage.setItem(KEY, parts.get("token"));
    parts.delete("token");
    history.replaceState(null, "", location.pathname + (parts.size ? `#${parts}` : ""));
  }
  return sessionStorage.getItem(KEY) || "";
}

const token = takeToken();

/** Asks the server; `body` makes it a POST. Throws an Error with the server's words. */
async function request(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(`/api/${path}`, options);
  } catch {
    throw new Error("the server does not answer: has it ended?");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error || `the server answers ${answer.status}`);
  }
  return answer;
}

export const ask = async (path, body) => (await request(path, body)).json();

/** An address's query; values that are lists stand several times. */
export function query(values) {
  const pairs = Object.entries(values).flatMap(([key, value]) => [value].flat().map((v) => [key, v]));
  return new URLSearchParams(pairs).toString();
}

/** An element with attributes (handlers as `onclick`, properties as `.value`) and children. */
export function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.startsWith(".")) made[key.slice(1)] = value;
    else if (value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== undefined && child !== null));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Says something to readers of the screen and to those who hear it. */
export function tell(text, warn = false) {
  const place = byId("status");
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("warn", warn);
}

// -- numbers -----------------------------------------------------------------------------------

export function number(value) {
  if (value === null || value === undefined) return "";
  return Math.abs(value) >= 10000
    ? Math.round(value).toLocaleString("en-US")
    : String(Number(value.toPrecision(4)));
}

export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const hours = Math.floor(whole / 3600);
  if (hours < 48) return `${hours} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// -- pictures ----------------------------------------------------------------------------------

const MOST = 150; // pictures that are kept
const kept = new Map();

async function blobOf(path) {
  if (!kept.has(path)) {
    kept.set(path, request(path).then((answer) => answer.blob()).then(URL.createObjectURL));
    kept.get(path).catch(() => kept.delete(path));
    const [oldest] = kept.keys();
    if (kept.size > MOST) {
      kept.get(oldest).then(URL.revokeObjectURL, () => {});
      kept.delete(oldest);
    }
  }
  return kept.get(path);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((one) => one.isIntersecting)) {
    seen.unobserve(entry.target);
    entry.target.show();
  }
}, { rootMargin: "300px" });

/** A picture that is fetched when it comes into sight, and shown large when it is pressed. */
export function picture(path, label, caption = label) {
  const image = el("img", { alt: label });
  const frame = el("button.picture", { type: "button", title: "show large", onclick: () => large(path, label) }, image);
  frame.show = async () => {
    try {
      image.src = await blobOf(path);
      await image.decode();
      image.classList.toggle("small", image.naturalWidth <= 128);
    } catch (error) {
      frame.replaceWith(el("p.warn", {}, `${label}: ${error.message}`));
    }
  };
  seen.observe(frame);
  return el("figure", {}, frame, el("figcaption", {}, caption));
}

async function large(path, label) {
  const image = el("img", { alt: label, src: await blobOf(path) });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 128));
  const close = el("button", { onclick: () => shown.close() }, "Close");
  const shown = el("dialog.large", { "aria-label": label, onclose: () => shown.remove() },
    image, el("p.soft", {}, label), close);
  document.body.append(shown);
  shown.showModal();
}

/** Asks before something happens; true if it shall. */
export function sure(question, yes) {
  return new Promise((resolve) => {
    const asked = el("dialog", { "aria-label": question },
      el("p", {}, question),
      el("div.buttons", {},
        el("button.stop", { onclick: () => asked.close("yes") }, yes),
        el("button", { onclick: () => asked.close(), autofocus: "" }, "Cancel")));
    asked.addEventListener("close", () => {
      resolve(asked.returnValue === "yes");
      asked.remove();
    });
    document.body.append(asked);
    asked.showModal();
  });
}

/** Repeats `act`, which returns the milliseconds until the next time, while the page is seen. */
export async function repeat(act) {
  for (;;) {
    let wait = 2000;
    if (!document.hidden) {
      try {
        wait = await act();
      } catch (error) {
        tell(error.message, true);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}
