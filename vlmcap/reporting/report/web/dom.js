// Elements, texts and numbers. Values from the data become text nodes or attributes, never markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const ROOT = document.documentElement;
const state = { language: "en", theme: "light" };

function say(key, ...values) {
  const text = WORDS[key][state.language === "ko" ? 1 : 0];
  return text.replace(/\{(\d)\}/g, (_, index) => String(values[Number(index)]));
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, setting] of Object.entries(value)) node.style.setProperty(property, setting);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function fixed(value, digits) {
  return value.toFixed(digits).replace(/^-(?=.*[1-9])/, "−").replace(/^-/, "");
}

// About three significant digits; callers may pass the number of digits of the whole column instead.
const digitsOf = (size) => (size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.095 || size === 0 ? 3 : 4);

function number(value, digits) {
  if (value === null || value === undefined) return "–";
  return fixed(value, digits ?? digitsOf(Math.abs(value)));
}

function signed(value, digits) {
  if (value === null || value === undefined) return "–";
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

function metricDigits(metric) {
  return digitsOf(Math.max(0, ...DATA.runs.map((run) => Math.abs(run.scores[metric] ?? 0))));
}

const probability = (value) => (value === null || value === undefined ? "–" : value < 0.001 ? "< 0.001" : fixed(value, value < 0.0995 ? 3 : 2));
// Formats of the metric that runs are compared by, and of its differences.
const score = (value) => number(value, MAIN_DIGITS);
const change = (value) => signed(value, MAIN_DIGITS);
const ofChance = (value) => `p ${value < 0.001 ? "" : "= "}${probability(value)}`;
const between = (ends, format) => `[${format(ends[0])}, ${format(ends[1])}]`;
const inMemory = (value) => (value === null || value === undefined ? "–" : say("gib", fixed(value, value < 10 ? 2 : 1)));

function duration(value) {
  if (value === null || value === undefined) return "–";
  const whole = Math.round(value);
  if (whole >= 3600) return say("hours", Math.floor(whole / 3600), Math.floor((whole % 3600) / 60));
  if (whole >= 600) return say("minutesOnly", Math.round(whole / 60));
  return whole >= 60 ? say("minutes", Math.floor(whole / 60), whole % 60) : say("secondsUnit", fixed(value, value < 10 ? 1 : 0));
}

function count(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["k", 1e3]]) if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  return String(value);
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}

// --- access to the data -----------------------------------------------------------------------------------------------------------------

const RUNS = new Map(DATA.runs.map((run) => [run.id, run]));
const GROUPS = new Map(DATA.groups.map((group) => [group.id, group]));
const ORDER = new Map(DATA.groups.map((group, index) => [group.id, index]));
const IS_ONE_RUN = Object.keys(DATA.commands).length > 0; // the page of a single run, which compares nothing
const NUM_COLOURS = 10;
const MAIN_DIGITS = metricDigits(DATA.metric);

const colourOf = (group) => `var(--c${(ORDER.get(group) ?? 0) % NUM_COLOURS})`;
// Beyond ten configurations colours repeat, with dashed lines and other markers.
const turnOf = (group) => Math.floor((ORDER.get(group) ?? 0) / NUM_COLOURS);
const dashOf = (group) => ["", "6 3", "2 3"][turnOf(group) % 3];

const swatch = (group) => h("span", { class: `swatch turn${turnOf(group) % 3}`, "aria-hidden": "true", style: { background: colourOf(group) } });

function label(metric) {
  const [split, ...rest] = metric.split("/");
  const name = rest.join("/");
  return name ? `${split}: ${DATA.labels[name] || name}` : DATA.labels[metric] || metric;
}

const mainLabel = () => DATA.metric_label;

function overWord(over) {
  return over === "clips" ? say("clipsWord") : over === "seeds" ? say("seedsWord") : say("bothWord");
}

// --- controls ---------------------------------------------------------------------------------------------------------------------------

function select(title, options, value, change) {
  const box = h("select", { "aria-label": title, onchange: (event) => change(event.target.value) }, options.map(([key, text]) => h("option", { value: key }, text)));
  box.value = value;
  return box;
}

function choice(title, options, value, change) {
  const buttons = options.map(([key, text]) =>
    h("button", { type: "button", "aria-pressed": String(key === value), onclick: () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button(key)));
      change(key);
    } , "data-key": key }, text));
  const button = (key) => buttons.find((other) => other.dataset.key === String(key));
  return h("div", { class: "choice", role: "group", "aria-label": title }, buttons);
}

function searchBox(title, value, change) {
  const box = h("input", { type: "search", placeholder: title, "aria-label": title, oninput: (event) => change(event.target.value) });
  box.value = value;
  return box;
}

async function copy(text, button) {
  let isDone = false;
  try {
    await navigator.clipboard.writeText(text);
    isDone = true;
  } catch {
    const area = h("textarea", { style: { position: "fixed", opacity: "0" } });
    area.value = text;
    document.body.append(area);
    area.select();
    isDone = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = say(isDone ? "copied" : "copyFailed");
  setTimeout(() => { button.textContent = say("copy"); }, 1600);
}

const copyButton = (text) => h("button", { type: "button", class: "copy", "aria-live": "polite", onclick: (event) => copy(text, event.currentTarget) }, say("copy"));

// --- tooltip ----------------------------------------------------------------------------------------------------------------------------

const TIP = h("div", { id: "tip", role: "status", hidden: true });

function showTip(children, x, y) {
  TIP.replaceChildren(...[children].flat());
  TIP.hidden = false;
  const width = TIP.offsetWidth, height = TIP.offsetHeight;
  const left = x + 14 + width > window.innerWidth ? Math.max(4, x - width - 14) : x + 14;
  const top = Math.min(Math.max(4, y + 14), Math.max(4, window.innerHeight - height - 4));
  TIP.style.setProperty("left", `${left}px`);
  TIP.style.setProperty("top", `${top}px`);
}

function hideTip() {
  TIP.hidden = true;
}

// Event handlers that show a tooltip on hover and on focus.
function tipHandlers(children) {
  return {
    onpointermove: (event) => showTip(children(), event.clientX, event.clientY),
    onpointerleave: hideTip,
    onfocus: (event) => { const box = event.target.getBoundingClientRect(); showTip(children(), box.right, box.bottom); },
    onblur: hideTip,
  };
}
