// The section of configurations and commands, and the assembly of the page.
const compared = { first: null, second: null, text: "", onlyDifferent: true };

const configOf = (run) => ({ ...(Object.keys(run.config).length ? DATA.common_config : {}), ...run.config });

function configuration() {
  if (!DATA.runs.length) return null;
  compared.first = compared.first || DATA.runs[0].id;
  compared.second = compared.second || (DATA.runs.find((run) => run.group !== DATA.runs[0].group) || DATA.runs[DATA.runs.length - 1]).id;
  const isAlone = DATA.runs.length === 1; // a single run has no second configuration to compare with
  const table = h("table", { class: "config" }), pair = h("div", { class: "commands" });
  const update = () => {
    const runs = [...new Set([compared.first, compared.second])].map((id) => RUNS.get(id)), [one, other = one] = runs.map(configOf);
    const keys = [...new Set([...Object.keys(one), ...Object.keys(other)])].sort();
    const differs = (key) => JSON.stringify(one[key]) !== JSON.stringify(other[key]);
    const rows = keys.filter((key) => (isAlone || !compared.onlyDifferent || differs(key)) && key.toLowerCase().includes(compared.text.toLowerCase().trim()));
    const cell = (config, key) => h("td", { class: differs(key) ? "differs" : null }, key in config ? h("code", {}, shown(config[key])) : h("span", { class: "muted" }, say(Object.keys(config).length ? "unset" : "noConfig")));
    table.replaceChildren(h("thead", {}, h("tr", {}, h("th", { scope: "col" }, say("key")), runs.map((run) => h("th", { scope: "col" }, swatch(run.group), run.name)))),
      h("tbody", {}, rows.length ? rows.map((key) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, key)), runs.map((run) => cell(configOf(run), key)))) : h("tr", {}, h("td", { colspan: 3, class: "muted" }, say("sameConfig")))));
    pair.replaceChildren(...runs.map(command));
  };
  const options = DATA.runs.map((run) => [run.id, run.name]);
  const box = h("input", { type: "checkbox", onchange: (event) => { compared.onlyDifferent = event.target.checked; update(); } });
  box.checked = compared.onlyDifferent;
  update();
  return h("section", { id: "configuration" }, h("h2", {}, say("configuration")),
    h("div", { class: "controls" }, isAlone ? null : [select(say("firstRun"), options, compared.first, (id) => { compared.first = id; update(); }),
      select(say("secondRun"), options, compared.second, (id) => { compared.second = id; update(); })],
      searchBox(say("keySearch"), compared.text, (text) => { compared.text = text; update(); }), isAlone ? null : h("label", {}, box, " ", say("onlyDifferent"))),
    h("div", { class: isAlone ? "scroll short" : "scroll", tabindex: "0", role: "region", "aria-label": say("configuration") }, table),
    h("h3", {}, say(isAlone ? "repeatCommand" : "commands")), pair,
    DATA.runs.length > 2 ? h("details", {}, h("summary", {}, say("allCommands")), h("div", { class: "commands" }, DATA.runs.map(command))) : null);
}

function command(run) {
  return h("div", { class: "command", "data-run": run.id }, h("div", { class: "command-name" }, swatch(run.group), run.name, h("span", { class: "muted small" }, [run.revision ? say("revision", run.revision) : "", run.folder].filter(Boolean).join(" · "))),
    run.command ? commandLine(run.command) : h("p", { class: "muted" }, "–"));
}

const commandLine = (text) => h("div", { class: "command-line" }, h("pre", { tabindex: "0" }, h("code", {}, text)), copyButton(text));

// --- the page ---------------------------------------------------------------------------------------------------------------------------

const SECTIONS = [["overview", header], ["leaderboard", leaderboard], ["effects", effects], ["curves", curves], ["costs", costs], ["categories", categories], ["clips", clips], ["configuration", configuration]];
const RUN_SECTIONS = [["overview", runHeader], ["clips", clips], ["scores", runScores], ["curves", runCurves], ["categories", categories], ["took", runTook], ["next", runNext], ["configuration", configuration]];

function remembered(key, value) {
  try { // pages opened as files may have no storage
    if (value !== undefined) localStorage.setItem(`vlmcap-report-${key}`, value);
    return localStorage.getItem(`vlmcap-report-${key}`);
  } catch {
    return null;
  }
}

function setTheme(theme) {
  state.theme = theme;
  ROOT.dataset.theme = theme;
}

function topBar(names) {
  const buttons = h("div", { class: "switches" },
    h("button", { type: "button", id: "language", lang: state.language === "ko" ? "en" : "ko", onclick: () => {
      state.language = state.language === "ko" ? "en" : "ko";
      remembered("language", state.language);
      render();
      document.getElementById("language").focus();
    } }, say("language")),
    h("button", { type: "button", id: "theme", "aria-label": say("theme"), title: say("theme"), onclick: () => {
      setTheme(state.theme === "dark" ? "light" : "dark");
      remembered("theme", state.theme);
    } }, s("svg", { width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" },
      s("circle", { cx: 8, cy: 8, r: 6.2, fill: "none", stroke: "currentColor", "stroke-width": 1.6 }), s("path", { d: "M8 1.8a6.2 6.2 0 0 1 0 12.4z", fill: "currentColor" }))));
  return [h("nav", { "aria-label": say("sections") }, names.map((name) => h("a", { href: `#${name}` }, say(`to${name[0].toUpperCase()}${name.slice(1)}`)))), buttons];
}

function render() {
  ROOT.lang = state.language;
  redraws.length = 0;
  hideTip();
  const parts = (IS_ONE_RUN ? RUN_SECTIONS : SECTIONS).map(([name, make]) => [name, make()]).filter(([, part]) => part);
  document.getElementById("page").replaceChildren(...parts.map(([, part]) => part));
  document.getElementById("bar").replaceChildren(...topBar(parts.map(([name]) => name)));
  redraws.forEach((redraw) => redraw());
}

function start() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  state.language = remembered("language") || ((navigator.language || "").startsWith("ko") ? "ko" : "en");
  setTheme(remembered("theme") || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", (event) => { if (!remembered("theme")) setTheme(event.matches ? "dark" : "light"); });
  document.body.append(TIP);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  render();
  let width = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // the bars of mobile browsers change only the height
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(() => redraws.forEach((redraw) => redraw()), 120);
  });
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

start();
