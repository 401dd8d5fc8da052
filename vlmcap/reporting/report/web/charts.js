// Plots of effects, learning curves and score against cost, and the table of categories.
const curve = { metric: null, hidden: new Set() };
const MAX_TIP_LINES = 12; // lines of a tooltip
const redraws = []; // functions that redraw the plots, which fill the width of their container

function drawn(title, draw) {
  const place = h("div", { class: "drawing" });
  const redraw = () => {
    const width = Math.max(260, Math.floor(place.clientWidth || 600));
    place.replaceChildren(draw(width));
  };
  redraws.push(redraw);
  return h("figure", {}, title ? h("figcaption", {}, title) : null, place);
}

function ticks(low, high, most) {
  const span = high - low || Math.abs(high) || 1, raw = span / Math.max(1, most), size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * size).find((one) => one >= raw);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) found.push(index * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function scale(low, high, from, to, pad = 0.04) {
  const room = (high - low || Math.abs(high) || 1) * pad;
  const start = low - room, end = high + room;
  const at = (value) => from + ((value - start) / (end - start)) * (to - from);
  return { at, start, end, back: (place) => start + ((place - from) / (to - from)) * (end - start) };
}

const tickText = (value, digits) => (Math.abs(value) >= 10000 ? count(value) : fixed(value, digits));

function axes(width, height, left, bottom, x, y, xTitle) {
  const across = ticks(x.start, x.end, width / 110), up = ticks(y.start, y.end, height / 45);
  return [
    up.found.map((value) => [s("line", { class: "grid", x1: left, x2: width - 8, y1: y.at(value), y2: y.at(value) }),
      s("text", { x: left - 7, y: y.at(value) + 4, "text-anchor": "end" }, tickText(value, up.digits))]),
    across.found.map((value) => s("text", { x: x.at(value), y: height - bottom + 17, "text-anchor": "middle" }, tickText(value, across.digits))),
    s("line", { class: "axis", x1: left, x2: width - 8, y1: height - bottom, y2: height - bottom }),
    s("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, xTitle),
  ];
}

function mark(group, x, y, size, more) {
  const shape = turnOf(group) % 3, colour = colourOf(group);
  if (shape === 1) return s("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, fill: colour, ...more });
  if (shape === 2) return s("path", { d: `M${x} ${y - size * 1.2}L${x + size * 1.2} ${y + size}L${x - size * 1.2} ${y + size}Z`, fill: colour, ...more });
  return s("circle", { cx: x, cy: y, r: size, fill: colour, ...more });
}

// --- effects ----------------------------------------------------------------------------------------------------------------------------

function effects() {
  const tested = DATA.effects.filter((effect) => effect.levels.length > 1);
  if (!tested.length) return null;
  const ends = tested.flatMap((effect) => effect.levels.flatMap((level) => [level.score, ...(level.interval || [])]));
  const [low, high] = range(ends);
  return h("section", { id: "effects" }, h("h2", {}, say("effects")), h("p", { class: "muted" }, mainLabel()),
    h("div", { class: "panels" }, tested.map((effect) => {
      const items = effect.levels.filter((level) => level.difference).map((level) => {
        const { value, low: from, high: to, adjusted_p_value: p } = level.difference;
        const tested = from === null || to === null ? "" : ` ${between([from, to], change)}, ${ofChance(p)}`;
        return h("li", {}, say("effectLevel", shown(level.value), change(value), tested));
      });
      return h("div", { class: "panel" }, h("h3", {}, effect.factor), drawn(null, (width) => effectDrawing(effect, low, high, width)),
        items.length ? h("ul", { class: "differences" }, items) : null,
        h("p", { class: "muted small" }, !effect.is_matched ? say("unmatched") : effect.num_combinations === 1 ? say("matchedOne") : say("matched", effect.num_combinations)));
    })));
}

function effectDrawing(effect, low, high, width) {
  const longest = Math.max(...effect.levels.map((level) => shown(level.value).length));
  const left = Math.min(width * 0.4, 14 + longest * 7.4), row = 30, height = effect.levels.length * row + 30, x = scale(low, high, left + 6, width - 62);
  const across = ticks(x.start, x.end, (width - left) / 90);
  const room = Math.floor((left - 10) / 7.2);
  return s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${effect.factor}: ${effect.levels.map((level) => `${shown(level.value)} ${score(level.score)}`).join(", ")}` },
    across.found.map((value) => [s("line", { class: "grid", x1: x.at(value), x2: x.at(value), y1: 4, y2: height - 24 }),
      s("text", { x: x.at(value), y: height - 8, "text-anchor": "middle" }, tickText(value, across.digits))]),
    effect.levels.map((level, index) => {
      const y = index * row + 18, text = shown(level.value), ends = level.interval;
      const title = `${text}: ${score(level.score)}${ends ? ` ${between(ends, score)}` : ""}`;
      return s("g", {}, s("title", {}, title),
        s("text", { class: "name", x: left - 6, y: y + 4, "text-anchor": "end" }, text.length > room ? `${text.slice(0, room - 1)}…` : text),
        ends ? s("line", { class: "whisker", x1: x.at(ends[0]), x2: x.at(ends[1]), y1: y, y2: y }) : null,
        s("circle", { class: index ? "dot" : "dot first", cx: x.at(level.score), cy: y, r: 5 }),
        s("text", { class: "name", x: width - 4, y: y + 4, "text-anchor": "end" }, score(level.score)));
    }));
}

// --- learning curves --------------------------------------------------------------------------------------------------------------------

function curves() {
  const metrics = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.curve).filter((key) => run.curve[key].length)))];
  if (!metrics.length) return null;
  const preferred = [DATA.metric, "val/loss", "train/loss"].filter((metric) => metrics.includes(metric));
  metrics.sort((a, b) => (preferred.indexOf(a) + 1 || 99) - (preferred.indexOf(b) + 1 || 99));
  if (!metrics.includes(curve.metric)) curve.metric = preferred.find((metric) => DATA.runs.some((run) => (run.curve[metric] || []).length > 1)) || metrics[0];
  const legend = h("div", { class: "legend" }), figure = drawn(null, (width) => curveDrawing(width, label(curve.metric), DATA.runs
    .filter((run) => (run.curve[curve.metric] || []).length && !curve.hidden.has(run.group)).map((run) => ({ id: run.group, name: run.name, points: run.curve[curve.metric] }))));
  const redraw = redraws[redraws.length - 1];
  const fillLegend = () => legend.replaceChildren(...DATA.groups.filter((group) => group.runs.some((id) => (RUNS.get(id)?.curve[curve.metric] || []).length)).map((group) =>
    h("button", { type: "button", "aria-pressed": String(!curve.hidden.has(group.id)), onclick: (event) => {
      if (!curve.hidden.delete(group.id)) curve.hidden.add(group.id);
      event.currentTarget.setAttribute("aria-pressed", String(!curve.hidden.has(group.id)));
      redraw();
    } }, swatch(group.id), group.name)));
  fillLegend();
  return h("section", { id: "curves" }, h("h2", {}, say("curves")),
    h("div", { class: "controls" }, h("label", {}, say("curveMetric"), " ",
      select(say("curveMetric"), metrics.map((metric) => [metric, label(metric)]), curve.metric, (value) => { curve.metric = value; fillLegend(); redraw(); }))),
    figure, legend, h("p", { class: "muted small" }, say("curveHint")));
}

// Draws lines over steps. Each line has an id, which determines its colour, a name, and points; lines of the same
// configuration have the same id.
function curveDrawing(width, title, lines) {
  const height = width < 500 ? 260 : 330, left = 54, bottom = 40;
  if (!lines.length) return h("p", { class: "muted" }, "–");
  const all = lines.flatMap((line) => line.points);
  const x = scale(...range(all.map((point) => point[0])), left, width - 8, 0.01), y = scale(...range(all.map((point) => point[1])), height - bottom, 12);
  const path = (points) => points.map((point, index) => `${index ? "L" : "M"}${x.at(point[0]).toFixed(1)} ${y.at(point[1]).toFixed(1)}`).join("");
  const drawing = lines.map(({ id, points }) => s("g", {},
    s("path", { d: path(points), fill: "none", stroke: colourOf(id), "stroke-width": 1.8, "stroke-dasharray": dashOf(id) || null, "stroke-linejoin": "round" }),
    points.length <= 12 ? points.map((point) => mark(id, x.at(point[0]), y.at(point[1]), 2.6, {})) : null));
  const cursor = s("line", { class: "cursor", y1: 8, y2: height - bottom, x1: -9, x2: -9 }), dots = s("g", {});
  const steps = [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b);
  let index = steps.length - 1;
  const show = (clientX, clientY) => {
    const step = steps[index], near = lines.map(({ id, name, points }) => ({ id, name, point: points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)) }))
      .sort((a, b) => b.point[1] - a.point[1]);
    cursor.setAttribute("x1", x.at(step));
    cursor.setAttribute("x2", x.at(step));
    dots.replaceChildren(...near.map(({ id, point }) => mark(id, x.at(point[0]), y.at(point[1]), 4, {})));
    const pools = new Map();
    near.forEach(({ id, point }) => pools.set(id, [...(pools.get(id) || []), point[1]]));
    const rows = near.length <= MAX_TIP_LINES ? near.map(({ id, name, point }) => [id, name, point[1]])
      : [...pools].map(([group, values]) => [group, values.length > 1 ? `${GROUPS.get(group).name}, ${say("meanOf", values.length)}` : GROUPS.get(group).name, values.reduce((a, b) => a + b, 0) / values.length]).sort((a, b) => b[2] - a[2]);
    const tipLines = rows.slice(0, MAX_TIP_LINES).map(([group, name, value]) => h("div", { class: "tip-row" }, swatch(group), h("span", {}, name), h("b", {}, number(value))));
    showTip([h("div", { class: "muted" }, `${title}, ${say("step")} ${step}`), ...tipLines, ...(rows.length > MAX_TIP_LINES ? [h("div", { class: "muted" }, `… ${rows.length - MAX_TIP_LINES}`)] : [])], clientX, clientY);
  };
  const end = () => { hideTip(); cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); dots.replaceChildren(); };
  const atCursor = (node) => { const box = node.getBoundingClientRect(); show(box.left + x.at(steps[index]), box.top + 30); };
  return s("svg", { class: "curves", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": `${say("curves")}: ${title}`,
    onpointermove: (event) => {
      const value = x.back(event.clientX - event.currentTarget.getBoundingClientRect().left);
      index = steps.reduce((best, step, i) => (Math.abs(step - value) < Math.abs(steps[best] - value) ? i : best), 0);
      show(event.clientX, event.clientY);
    },
    onpointerleave: end, onblur: end,
    onkeydown: (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") end();
      if (!move) return;
      event.preventDefault();
      index = Math.min(steps.length - 1, Math.max(0, index + move));
      atCursor(event.currentTarget);
    } }, axes(width, height, left, bottom, x, y, say("step")), drawing, cursor, dots);
}

// --- score against cost -----------------------------------------------------------------------------------------------------------------

const COSTS = { peak_memory_gib: ["peak_memory_gib", 1, inMemory], seconds: ["secondsCost", 60, duration], trained: ["trainedCost", 1e6, count] };

function costs() {
  const known = DATA.fronts.filter((front) => COSTS[front.cost] && DATA.groups.some((group) => DATA.metric in group.scores && (group.costs[front.cost] ?? null) !== null));
  if (!known.length) return null;
  return h("section", { id: "costs" }, h("h2", {}, say("costs")),
    h("div", { class: "panels" }, known.map((front) => h("div", { class: "panel" }, h("h3", {}, say(COSTS[front.cost][0])), drawn(null, (width) => costDrawing(front, width))))),
    h("p", { class: "muted small" }, h("span", { class: "front-key", "aria-hidden": "true" }), say("front")));
}

function costDrawing(front, width) {
  const [title, unit, format] = COSTS[front.cost], height = 270, left = 54, bottom = 40;
  const groups = DATA.groups.filter((group) => DATA.metric in group.scores && (group.costs[front.cost] ?? null) !== null);
  const cost = (group) => group.costs[front.cost] / unit, reached = (group) => group.scores[DATA.metric];
  const x = scale(...range(groups.map(cost)), left, width - 8, 0.1), y = scale(...range(groups.flatMap((group) => [reached(group), ...(group.intervals[DATA.metric] || [])])), height - bottom, 12);
  const best = front.groups.map((id) => GROUPS.get(id)).filter((group) => group && groups.includes(group));
  const steps = best.map((group, index) => (index ? `H${x.at(cost(group))}V${y.at(reached(group))}` : `M${x.at(cost(group))} ${y.at(reached(group))}`)).join("") + (best.length ? `H${width - 8}` : "");
  const tip = (group) => [h("div", {}, swatch(group.id), h("b", {}, group.name)), h("div", {}, `${mainLabel()} ${score(reached(group))}`), h("div", {}, format(group.costs[front.cost])),
    best.includes(group) ? null : h("div", { class: "muted" }, say("offFront"))].filter(Boolean);
  return s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${mainLabel()}: ${say(title)}` },
    axes(width, height, left, bottom, x, y, say(title)), s("path", { class: "front", d: steps }),
    groups.map((group) => {
      const ends = group.intervals[DATA.metric], place = x.at(cost(group)), isFront = best.includes(group);
      return s("g", { opacity: isFront ? 1 : 0.55 },
        ends ? s("line", { x1: place, x2: place, y1: y.at(ends[0]), y2: y.at(ends[1]), stroke: colourOf(group.id), "stroke-width": 1.5, opacity: 0.5 }) : null,
        mark(group.id, place, y.at(reached(group)), isFront ? 6 : 4.5, { class: "point", tabindex: "0", role: "img",
          "aria-label": `${group.name}: ${score(reached(group))}, ${format(group.costs[front.cost])}`, ...tipHandlers(() => tip(group)) }));
    }),
    frontNames(best, width, (group) => x.at(cost(group)), (group) => y.at(reached(group))));
}

// Labels of the Pareto front's points, omitting those that would overlap.
function frontNames(best, width, x, y) {
  const taken = [];
  return best.map((group) => {
    const length = Math.min(group.name.length, 26) * 6.4, isRight = x(group) > width * 0.55;
    const from = isRight ? x(group) - 9 - length : x(group) + 9, at = y(group) - 9;
    const isFree = from > 50 && from + length < width && taken.every(([other, long, up]) => Math.abs(up - at) > 14 || from > other + long || other > from + length);
    if (!isFree) return null;
    taken.push([from, length, at]);
    const text = group.name.length > 26 ? `${group.name.slice(0, 25)}…` : group.name;
    return s("text", { class: "name", x: isRight ? x(group) - 9 : x(group) + 9, y: at, "text-anchor": isRight ? "end" : "start" }, text);
  });
}

// --- categories -------------------------------------------------------------------------------------------------------------------------

const heat = { metric: null };

function categories() {
  const metrics = [...new Set(DATA.categories.flatMap((category) => Object.values(category.scores).flatMap(Object.keys)))];
  if (!metrics.length) return null;
  if (!metrics.includes(heat.metric)) heat.metric = metrics.includes(DATA.metric.split("/").pop()) ? DATA.metric.split("/").pop() : metrics[0];
  const table = h("table", { class: "heat" });
  const update = () => {
    const rows = DATA.groups.map((group) => ({ group, values: DATA.categories.map((category) => {
      const values = group.runs.map((id) => category.scores[id]?.[heat.metric]).filter((value) => value !== undefined && value !== null);
      return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
    }) })).filter((row) => row.values.some((value) => value !== null));
    const all = rows.flatMap((row) => row.values).filter((value) => value !== null), [low, high] = range(all);
    const most = DATA.categories.map((_, index) => Math.max(...rows.map((row) => row.values[index] ?? -Infinity)));
    table.replaceChildren(
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, say("name")), DATA.categories.map((category) => h("th", { scope: "col", class: "number" }, category.name, h("div", { class: "muted small" }, say("clipCount", category.num_clips)))))),
      h("tbody", {}, rows.map((row) => h("tr", {}, h("th", { scope: "row" }, swatch(row.group.id), row.group.name),
        row.values.map((value, index) => h("td", { class: value === most[index] ? "number strong" : "number",
          style: value === null ? null : { "--heat": `${Math.round(6 + 44 * ((value - low) / (high - low || 1)))}%` } }, number(value)))))));
  };
  update();
  return h("section", { id: "categories" }, h("h2", {}, say("categories")),
    h("div", { class: "controls" }, h("label", {}, say("categoryMetric"), " ", select(say("categoryMetric"), metrics.map((metric) => [metric, label(metric)]), heat.metric, (value) => { heat.metric = value; update(); }))),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": say("categories") }, table), h("p", { class: "muted small" }, say("categoryHint")));
}
