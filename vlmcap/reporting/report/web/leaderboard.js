// The head of the page and the leaderboard.
const board = { pooled: true, key: "rank", descending: false, text: "", values: {} };

function header() {
  const groups = DATA.groups.filter((group) => DATA.metric in group.scores);
  const facts = [
    say("countRuns", DATA.runs.length), say("countGroups", DATA.groups.length), DATA.num_clips ? say("countClips", DATA.num_clips) : null,
    say("comparedBy", mainLabel()), DATA.tokenizer ? say("tokensBy", DATA.tokenizer) : null, say("madeBy", DATA.version, DATA.created),
  ];
  return h("section", { id: "overview" },
    h("h1", {}, DATA.title),
    h("p", { class: "facts" }, facts.filter(Boolean).map((fact) => h("span", {}, fact))),
    answer(groups), troubles(),
    DATA.notes.length ? h("details", { class: "notes" }, h("summary", {}, say("notes")), h("ul", {}, DATA.notes.map((note) => h("li", {}, note[state.language])))) : null);
}

function answer(groups) {
  const best = groups.find((group) => group.is_best);
  if (!best) return h("p", { class: "answer" }, say("answerNone"));
  const tested = groups.filter((group) => group.is_best || group.difference);
  if (tested.length < 2) return h("p", { class: "answer" }, say("answerOnly", best.name));
  const tied = tested.filter((group) => group.is_tied && !group.is_best);
  const ends = best.intervals[DATA.metric];
  const reached = `${mainLabel()} ${score(best.scores[DATA.metric])}${ends ? ` ${between(ends, score)}` : ""}`;
  const lines = [h("p", { class: "lead" }, swatch(best.id), say("answerBest", best.name, tested.length), " ", h("span", { class: "muted" }, reached))];
  if (!tied.length) lines.push(h("p", {}, say("answerClear")));
  else {
    const names = tied.slice(0, 6).map((group) => group.name).join(" · ") + (tied.length > 6 ? " …" : "");
    lines.push(h("p", {}, say("answerTied", names)));
    const least = (cost) => [best, ...tied].filter((group) => group.costs[cost] !== null && group.costs[cost] !== undefined)
      .sort((a, b) => a.costs[cost] - b.costs[cost])[0];
    const smallest = least("peak_memory_gib"), fastest = least("seconds");
    const hints = smallest && smallest === fastest ? [say("answerLeast", smallest.name, inMemory(smallest.costs.peak_memory_gib), duration(fastest.costs.seconds))]
      : [smallest ? say("answerCheapest", smallest.name, inMemory(smallest.costs.peak_memory_gib)) : "", fastest ? say("answerFastest", fastest.name, duration(fastest.costs.seconds)) : ""];
    lines.push(h("p", { class: "muted" }, hints.filter(Boolean).join(" ")));
  }
  return h("div", { class: "answer" }, lines);
}

function badge(kind) {
  return h("span", { class: `badge ${kind}` }, say(kind));
}

function troubles() {
  const runs = DATA.runs.filter((run) => run.status !== "finished" || run.is_collapsed || run.warnings.length || run.not_compared);
  if (!runs.length) return null;
  const rows = runs.map((run) => {
    const reasons = [run.reason, ...run.warnings, run.not_compared].filter((text, index, all) => text && all.indexOf(text) === index);
    const kinds = [run.status === "finished" ? null : run.status, run.is_collapsed ? "collapsed" : null].filter(Boolean);
    return h("tr", {}, h("th", { scope: "row" }, swatch(run.group), run.name),
      h("td", {}, (kinds.length ? kinds : ["warned"]).map(badge)),
      h("td", { class: "why" }, reasons.length ? reasons.map((text) => h("div", {}, text)) : run.is_collapsed ? say("collapsedWhy") : "–"),
      h("td", { class: "number" }, inMemory(run.planned_gib)));
  });
  const head = ["troubleRun", "troubleWhat", "troubleWhy", "troublePlan"].map((key, index) => h("th", { scope: "col", class: index === 3 ? "number" : null }, say(key)));
  return h("details", { class: "troubles", open: runs.length <= 6 }, h("summary", {}, say("troubles", runs.length)),
    h("div", { class: "scroll", tabindex: "0" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows))));
}

// --- rows -------------------------------------------------------------------------------------------------------------------------------

function boardRows() {
  if (board.pooled) {
    return DATA.groups.map((group, index) => ({
      rank: DATA.metric in group.scores ? index + 1 : null, id: group.id, group, name: group.name, factors: group.factors, scores: group.scores,
      intervals: group.intervals, over: group.over, costs: group.costs, seeds: group.seeds.length, runs: group.runs.map((id) => RUNS.get(id)).filter(Boolean),
    }));
  }
  return DATA.runs.map((run, index) => ({
    rank: DATA.metric in run.scores ? index + 1 : null, id: run.id, group: GROUPS.get(run.group), name: run.name, factors: run.factors, scores: run.scores,
    intervals: run.intervals, over: "clips", seeds: run.seed, runs: [run],
    costs: { peak_memory_gib: run.peak_memory_gib, seconds: run.seconds.total ?? null, trained: run.parameters.trained ?? null, total: run.parameters.total ?? null },
  }));
}

function verdict(row) {
  const group = row.group;
  if (!group || !(DATA.metric in row.scores)) {
    const done = row.runs.filter((run) => run.status === "finished").length;
    return done < row.runs.length ? say("partly", done, row.runs.length) : say("notTested");
  }
  if (group.is_best) return say("isBest");
  if (!group.difference) return row.runs.map((run) => run.not_compared).find(Boolean) || say("notTested");
  if (!group.difference.over) return say("isUntested");
  if (!group.is_tied) return say("isWorse");
  return say({ clips: "isTiedClips", seeds: "isTiedSeeds" }[group.difference.over] || "isTiedBoth");
}

function boardColumns() {
  const rest = DATA.metrics.filter((metric) => metric !== DATA.metric);
  const costs = [["peak_memory_gib", "memory", inMemory], ["seconds", "time", duration], ["trained", "trained", count], ["total", "allParameters", count]];
  const difference = (row) => (row.group && row.group.difference) || null;
  const lastBest = (value) => (value === null || value === undefined ? null : value);
  return [
    { key: "rank", text: say("rank"), value: (row) => row.rank, cell: (row) => row.rank ?? "–", kind: "number" },
    { key: "name", text: say(board.pooled ? "name" : "runName"), value: (row) => row.name, cell: nameCell, kind: "name" },
    { key: "score", text: mainLabel(), value: (row) => row.scores[DATA.metric], cell: scoreCell, kind: "wide", descends: DATA.is_higher_better },
    ...(board.pooled ? [
      { key: "difference", text: say("toBest"), value: (row) => (row.group.is_best ? 0 : lastBest(difference(row)?.value)), cell: differenceCell, kind: "wide", descends: true },
      { key: "p", text: say("pValue"), value: (row) => difference(row)?.adjusted_p_value, cell: (row) => (difference(row) ? probability(difference(row).adjusted_p_value) : "–"), kind: "number" },
      { key: "verdict", text: say("verdict"), value: verdict, cell: verdict, kind: "verdict" },
    ] : []),
    { key: "seeds", text: say(board.pooled ? "seeds" : "seed"), value: (row) => row.seeds, cell: (row) => row.seeds ?? "–", kind: "number" },
    ...costs.filter(([cost]) => DATA.groups.some((group) => group.costs[cost] !== null && group.costs[cost] !== undefined))
      .map(([cost, key, format]) => ({ key: `cost:${cost}`, text: say(key), value: (row) => row.costs[cost], cell: (row) => format(row.costs[cost]), kind: "number" })),
    ...rest.map((metric) => ({ key: `score:${metric}`, text: label(metric), value: (row) => row.scores[metric], cell: (row) => number(row.scores[metric], metricDigits(metric)), kind: "number", descends: true })),
    ...DATA.factors.map((factor) => ({ key: `factor:${factor}`, text: factor, value: (row) => row.factors[factor], cell: (row) => shown(row.factors[factor]), kind: "factor" })),
  ];
}

function nameCell(row) {
  const unfinished = row.runs.filter((run) => run.status !== "finished"), isPart = unfinished.length && unfinished.length < row.runs.length;
  const chips = isPart ? [h("span", { class: "badge" }, say("partly", row.runs.length - unfinished.length, row.runs.length))] : [...new Set(unfinished.map((run) => run.status))].map(badge);
  if (row.runs.some((run) => run.is_collapsed)) chips.push(badge("collapsed"));
  return [swatch(row.group ? row.group.id : row.id), h("span", { class: row.group && row.group.is_best && board.pooled ? "strong" : null }, row.name), chips.map((chip) => [" ", chip])];
}

// A bar of an interval with a dot at the value, on the same scale in all rows.
function bar(value, ends, range, colour, title, zero) {
  const width = 120, height = 16, at = (x) => 3 + ((x - range[0]) / (range[1] - range[0] || 1)) * (width - 6);
  return s("svg", { class: "bar", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title },
    s("title", {}, title), s("line", { class: "rail", x1: 0, x2: width, y1: 8, y2: 8 }),
    zero ? s("line", { class: "zero", x1: at(0), x2: at(0), y1: 1, y2: 15 }) : null,
    ends ? s("rect", { x: at(ends[0]), width: Math.max(1, at(ends[1]) - at(ends[0])), y: 4.5, height: 7, rx: 3.5, fill: colour, opacity: 0.4 }) : null,
    s("circle", { cx: at(value), cy: 8, r: 3.6, fill: colour }));
}

function range(values, takesZero = false) {
  const all = takesZero ? [0, ...values] : values;
  return [Math.min(...all), Math.max(...all)];
}

function scoreCell(row) {
  const value = row.scores[DATA.metric];
  if (value === undefined || value === null) return "–";
  const rows = board.pooled ? DATA.groups : DATA.runs;
  const all = range(rows.flatMap((other) => [other.scores[DATA.metric], ...(other.intervals[DATA.metric] || [])]).filter((x) => x !== undefined && x !== null));
  const ends = row.intervals[DATA.metric];
  const title = ends ? `${score(value)} ${between(ends, score)}, ${say("intervalOver", overWord(row.over))}` : score(value);
  return h("div", { class: "measure" }, h("span", { class: "value" }, score(value)), bar(value, ends, all, row.group ? colourOf(row.group.id) : "var(--muted)", title, false),
    ends ? h("span", { class: "ends" }, between(ends, score)) : null);
}

function differenceCell(row) {
  const difference = row.group && row.group.difference;
  if (!difference) return "–";
  const all = range(DATA.groups.flatMap((group) => (group.difference ? [group.difference.value, group.difference.low ?? 0, group.difference.high ?? 0] : [])), true);
  const ends = difference.low === null || difference.high === null ? null : [difference.low, difference.high];
  const title = ends ? `${change(difference.value)} ${between(ends, change)}, ${say("intervalOver", overWord(difference.over))}` : change(difference.value);
  return h("div", { class: "measure" }, h("span", { class: "value" }, change(difference.value)),
    bar(difference.value, ends, all, row.group.is_tied ? "var(--muted)" : "var(--bad)", title, true),
    ends ? h("span", { class: "ends" }, between(ends, change)) : null);
}

// --- the table --------------------------------------------------------------------------------------------------------------------------

function isWanted(row) {
  const words = board.text.toLowerCase().split(/\s+/).filter(Boolean);
  const text = [row.name, ...Object.entries(row.factors).map(([key, value]) => `${key}=${shown(value)}`), ...row.runs.map((run) => `${run.status} ${run.id} ${run.folder}`)].join(" ").toLowerCase();
  return words.every((word) => text.includes(word)) && Object.entries(board.values).every(([factor, value]) => value === "" || JSON.stringify(row.factors[factor] ?? null) === value);
}

function sorted(rows, column) {
  const sign = board.descending ? -1 : 1, missing = (value) => value === null || value === undefined;
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  return [...rows].sort((one, other) => {
    const a = column.value(one), b = column.value(other);
    if (missing(a) || missing(b)) return missing(a) - missing(b); // missing values are last in both directions
    return sign * order(a, b);
  });
}

function leaderboard() {
  const table = h("table", { class: "board" }), status = h("p", { class: "muted", role: "status" });
  const update = () => {
    const columns = boardColumns(), column = columns.find((one) => one.key === board.key) || columns[0];
    const all = boardRows(), rows = sorted(all.filter(isWanted), column);
    const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.sort : null;
    const sort = (one) => {
      board.descending = board.key === one.key ? !board.descending : Boolean(one.descends);
      board.key = one.key;
      update();
    };
    const head = columns.map((one) => h("th", { scope: "col", class: one.kind, "aria-sort": one.key === column.key ? (board.descending ? "descending" : "ascending") : null },
      h("button", { type: "button", "data-sort": one.key, onclick: () => sort(one) }, one.text)));
    const body = rows.map((row) => h("tr", { "data-id": row.id, class: row.group && row.group.is_best && board.pooled ? "best" : null },
      columns.map((one) => h(one.kind === "name" ? "th" : "td", { class: one.kind, scope: one.kind === "name" ? "row" : null }, one.cell(row)))));
    table.replaceChildren(h("thead", {}, h("tr", {}, head)),
      h("tbody", {}, body.length ? body : h("tr", {}, h("td", { colspan: columns.length, class: "muted" }, say("noRow")))));
    if (focused && table.isConnected) table.querySelector(`[data-sort="${CSS.escape(focused)}"]`)?.focus();
    status.textContent = `${say("shown", rows.length, all.length)} · ${say("sortedHint")}`;
  };
  const filters = DATA.factors.map((factor) => {
    const values = [...new Set(DATA.runs.filter((run) => factor in run.factors).map((run) => JSON.stringify(run.factors[factor])))];
    const options = [["", say("anyValue", factor)], ...values.map((value) => [value, `${factor}: ${shown(JSON.parse(value))}`])];
    return select(factor, options, board.values[factor] ?? "", (value) => { board.values[factor] = value; update(); });
  });
  update();
  return h("section", { id: "leaderboard" }, h("h2", {}, say("leaderboard")),
    h("div", { class: "controls" },
      choice(say("show"), [["pooled", say("pooled")], ["single", say("single")]], board.pooled ? "pooled" : "single", (key) => { board.pooled = key === "pooled"; update(); }),
      searchBox(say("search"), board.text, (text) => { board.text = text; update(); }), filters),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": say("leaderboard") }, table), status);
}
