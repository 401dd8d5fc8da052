// The sections of the page of a single run: scores and their meaning, curves, costs, and next steps.
const RUN = DATA.runs[0];
const SPLIT = DATA.metric.split("/")[0];
const MAIN_SCORES = ["facts/mean", "facts/*", "cider", "bleu_4", "rouge_l", "meteor_ko", "content_f1", "chrf", "distinct_ratio", "length_ratio", "repetition_rate", "loss"];
const READINGS = {
  cider: "readCider", cider_d: "readCiderD", rouge_l: "readRouge", meteor: "readMeteor", meteor_ko: "readMeteor", chrf: "readChrf", distinct_ratio: "readDistinct",
  length_ratio: "readLength", self_bleu: "readSelfBleu", repetition_rate: "readRepetition", loss: "readLoss", "facts/mean": "readFactsMean",
};

function runHeader() {
  const facts = [RUN.folder, say("madeBy", DATA.version, DATA.created), RUN.revision ? say("revision", RUN.revision) : null, RUN.seed === null ? null : `${say("seed")} ${RUN.seed}`,
    RUN.parameters.total ? say("trainedOf", count(RUN.parameters.trained), count(RUN.parameters.total)) : null, DATA.tokenizer ? say("tokensBy", DATA.tokenizer) : null];
  const ends = RUN.intervals[DATA.metric], value = RUN.scores[DATA.metric], swapped = RUN.scores[`${SPLIT}/swapped/${DATA.metric.slice(SPLIT.length + 1)}`] ?? null;
  const looks = ends && swapped !== null && DATA.is_higher_better ? say(ends[0] > swapped ? "runLooks" : "runBlind", score(swapped)) : null;
  return h("section", { id: "overview" }, h("h1", {}, DATA.title), h("p", { class: "facts" }, facts.filter(Boolean).map((fact) => h("span", {}, fact))),
    h("div", { class: "answer" }, h("p", { class: "lead" }, `${scoreName(DATA.metric)} ${score(value)} `, h("span", { class: "muted" }, ends ? `${between(ends, score)} · ` : "", say("splitOf", SPLIT), DATA.num_clips ? ` · ${say("countClips", DATA.num_clips)}` : "")),
      h("p", {}, readingOf(DATA.metric.slice(SPLIT.length + 1))), looks ? h("p", {}, looks) : null),
    troubles());
}

// --- scores -----------------------------------------------------------------------------------------------------------------------------

function scoreName(metric) {
  const [, ...rest] = metric.split("/"), name = rest.join("/");
  if (name === "facts/mean") return say("factsMean");
  return name.startsWith("facts/") ? say("factOf", name.slice(6)) : DATA.labels[name] || name;
}

// One sentence on the meaning of a score, and the score of a model that ignores the video if it is known.
function readingOf(name) {
  const chance = RUN.scores[`${SPLIT}/permuted/${name}`];
  if (name.startsWith("facts/")) {
    const meaning = name === "facts/mean" ? say("readFactsMean") : say("readFact", name.slice(6));
    return chance === undefined ? meaning : `${meaning} ${say("readChance", number(chance, 2))}`;
  }
  const family = { bleu: "readBleu", content: "readContent", siglip: "readSiglip", bertscore: "readBert" }[name.split(/[_/]/)[0]];
  return READINGS[name] || family ? say(READINGS[name] || family) : "";
}

function runScores() {
  const splits = [SPLIT, ...["test", "val", "train"].filter((split) => split !== SPLIT)].filter((split) => Object.keys(RUN.scores).some((key) => key.startsWith(`${split}/`)));
  const names = [...new Set(Object.keys(RUN.scores).map((key) => key.split("/").slice(1).join("/")))].filter((name) => !/^(swapped|permuted|category|visual_reliance)\//.test(name));
  const place = (name) => MAIN_SCORES.indexOf(name.startsWith("facts/") && name !== "facts/mean" ? "facts/*" : name);
  const headline = DATA.metric.slice(SPLIT.length + 1), rank = (name) => (name === headline ? -1 : place(name));
  const main = names.filter((name) => name === headline || place(name) >= 0).sort((a, b) => rank(a) - rank(b)), more = names.filter((name) => !main.includes(name));
  const others = [["swapped", "ofSwapped"], ["permuted", "ofChance"]].filter(([kind]) => names.some((name) => `${SPLIT}/${kind}/${name}` in RUN.scores));
  const looks = names.filter((name) => `${SPLIT}/visual_reliance/own/${name}` in RUN.scores);
  return h("section", { id: "scores" }, h("h2", {}, say("scores")), others.length ? h("p", { class: "muted small" }, say("swappedHint")) : null,
    scoreTable(main, splits, others), looks.length ? [h("h3", {}, say("looksHeading")), lookTable(looks)] : null,
    more.length ? h("details", {}, h("summary", {}, say("moreScores", more.length)), scoreTable(more, splits, others)) : null);
}

const scrolling = (name, table) => h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": say(name) }, table);

function scoreTable(names, splits, others) {
  const cell = (key, ends) => h("td", { class: "number" }, number(RUN.scores[key]), ends ? h("div", { class: "muted small" }, between(ends, number)) : null);
  const head = [say("scoreWord"), ...splits, ...others.map(([, word]) => say(word))];
  return scrolling("scores", h("table", { class: "readings", style: { "--columns": splits.length + others.length } },
    h("thead", {}, h("tr", {}, head.map((text, index) => h("th", { scope: "col", class: index ? "number" : null }, text)))),
    h("tbody", {}, names.map((name) => h("tr", { "data-score": name }, h("th", { scope: "row" }, scoreName(`${SPLIT}/${name}`), h("div", { class: "muted small reading" }, readingOf(name))),
      splits.map((split) => cell(`${split}/${name}`, split === SPLIT ? RUN.intervals[`${split}/${name}`] : null)), others.map(([kind]) => cell(`${SPLIT}/${kind}/${name}`)))))));
}

// Scores with the clip's own video, another clip's and a black one, as measured by callbacks=visual_reliance.
function lookTable(names) {
  const videos = [["own", "ownVideo"], ["swapped", "otherVideo"], ["blanked", "blackVideo"]];
  return scrolling("looksHeading", h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, say("scoreWord")), videos.map(([, word]) => h("th", { scope: "col", class: "number" }, say(word))))),
    h("tbody", {}, names.map((name) => h("tr", {}, h("th", { scope: "row" }, scoreName(`${SPLIT}/${name}`)), videos.map(([video]) => h("td", { class: "number" }, number(RUN.scores[`${SPLIT}/visual_reliance/${video}/${name}`]))))))));
}

// --- curves -----------------------------------------------------------------------------------------------------------------------------

function runCurves() {
  const known = Object.keys(RUN.curve).filter((key) => RUN.curve[key].length), wanted = [`val/${DATA.metric.slice(SPLIT.length + 1)}`, "val/cider"].find((key) => known.includes(key));
  const panels = [["lossCurve", known.filter((key) => key.endsWith("/loss"))], ["scoreCurve", wanted && wanted !== "val/loss" ? [wanted] : []], ["rateCurve", known.filter((key) => key.startsWith("train/lr_"))]].filter(([, keys]) => keys.length);
  if (!panels.length) return null;
  return h("section", { id: "curves" }, h("h2", {}, say("curves")), h("div", { class: "panels" }, panels.map(([word, keys]) => {
    const lines = keys.map((key) => ({ id: key, name: curveName(key), points: RUN.curve[key] }));
    keys.forEach((key, index) => ORDER.set(key, index)); // determines the colour
    return h("div", { class: "panel" }, h("h3", {}, say(word)), drawn(null, (width) => curveDrawing(width, say(word), lines)),
      h("p", { class: "small line-names" }, lines.map((line) => h("span", {}, swatch(line.id), line.name))));
  })), h("p", { class: "muted small" }, say("runCurveHint")));
}

const curveName = (key) => (key.startsWith("train/lr_") ? key.slice(9) : key.endsWith("/loss") ? key.split("/")[0] : scoreName(key));

// --- costs and next steps -----------------------------------------------------------------------------------------------------------------

function runTook() {
  const { seconds } = RUN, planned = RUN.planned_gib !== null || RUN.planned_fit_s !== null;
  const scored = seconds.total !== undefined && seconds.fit !== undefined ? seconds.total - seconds.fit - (seconds.prepare ?? 0) : null;
  const rows = [["peak", inMemory(RUN.planned_gib), inMemory(RUN.peak_memory_gib)], ["tookPrepare", "–", duration(seconds.prepare)], ["tookFit", duration(RUN.planned_fit_s), duration(seconds.fit)],
    ["tookScore", "–", duration(scored)], ["tookTotal", "–", duration(seconds.total)]].filter((row) => row.slice(1).some((text) => text !== "–"));
  if (!rows.length) return null;
  return h("section", { id: "took" }, h("h2", {}, say("took")),
    h("table", {}, h("thead", {}, h("tr", {}, ["", ...(planned ? [say("plannedWord")] : []), say("tookWord")].map((text, index) => h("th", { scope: "col", class: index ? "number" : null }, text)))),
      h("tbody", {}, rows.map(([word, plan, real]) => h("tr", {}, h("th", { scope: "row" }, say(word)), planned ? h("td", { class: "number" }, plan) : null, h("td", { class: "number" }, real))))),
    planned ? null : h("p", { class: "muted small" }, say("noPlan")));
}

function runNext() {
  const words = { caption: "nextCaption", evaluate: "nextEvaluate", resume: "nextResume", sweep: "nextSweep", compare: "nextCompare" };
  const known = Object.keys(words).filter((name) => DATA.commands[name]);
  return known.length ? h("section", { id: "next" }, h("h2", {}, say("next")), known.map((name) => h("div", { class: "command", "data-command": name }, h("div", { class: "command-name" }, say(words[name])), commandLine(DATA.commands[name])))) : null;
}
