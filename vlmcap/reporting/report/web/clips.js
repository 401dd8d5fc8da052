// Captions of the same clip side by side, with differing words highlighted.
const HAS_FACTS = DATA.clips.some((clip) => clip.reference_marks.length);
const view = { tab: IS_ONE_RUN ? "all" : "worst", text: "", colours: HAS_FACTS && IS_ONE_RUN ? "facts" : "reference", runs: null, shown: 0 };
const PAGE_SIZE = IS_ONE_RUN ? 12 : 8, NUM_PICKED = 4, FRAME_MS = 180;
const film = { isOn: !window.matchMedia("(prefers-reduced-motion: reduce)").matches, at: 0, timer: 0 };

const plainWord = (word) => word.toLowerCase().replace(/^[\s.,!?;:"'“”‘’()[\]…·]+|[\s.,!?;:"'“”‘’()[\]…·]+$/g, "");
const wordsOf = (text) => text.split(/\s+/).filter(Boolean);

// Whether two words differ only in their ending, as with Korean particles: they share a prefix of at least two letters
// and at least half of the longer word.
function isNear(word, other) {
  let shared = 0;
  while (shared < word.length && word[shared] === other[shared]) shared += 1;
  return shared >= 2 && 2 * shared >= Math.max(word.length, other.length);
}

// The largest number of occurrences of each word in any reference.
function counted(references) {
  const most = new Map();
  references.forEach((reference) => {
    const here = new Map();
    wordsOf(reference).map(plainWord).forEach((word) => here.set(word, (here.get(word) || 0) + 1));
    here.forEach((times, word) => most.set(word, Math.max(times, most.get(word) || 0)));
  });
  return most;
}

// For each word: "same" if it is in the references, "near" if only its ending differs, else "other". Occurrences beyond
// those in a reference count as "other".
function kindsAgainst(words, known) {
  const left = new Map(known), all = [...known.keys()];
  return words.map(plainWord).map((word) => {
    if (left.get(word) > 0) {
      left.set(word, left.get(word) - 1);
      return "same";
    }
    return !known.has(word) && all.some((other) => isNear(word, other)) ? "near" : "other";
  });
}

function coloured(words, kindOf) {
  return words.map((word, index) => [index ? " " : "", kindOf(index) ? h("span", { class: kindOf(index) }, word) : word]);
}

// A text with its facts as elements; marks count code points, not UTF-16 units.
function marked(text, marks, kindOf) {
  const letters = [...text], nodes = [];
  let at = 0;
  marks.forEach((mark) => {
    const [start, end, fact] = mark;
    nodes.push(letters.slice(at, start).join(""), h("span", { class: kindOf(mark), title: fact }, letters.slice(start, end).join("")));
    at = end;
  });
  return [...nodes, letters.slice(at).join("")];
}

const factKind = ([, , , isRight]) => (isRight ? "right" : "wrong");

function captionNodes(clip, captions) {
  const words = captions.map((caption) => wordsOf(caption.text)), said = new Map();
  words.forEach((list) => new Set(list.map(plainWord)).forEach((word) => said.set(word, (said.get(word) || 0) + 1)));
  const known = counted(clip.references), spoken = [...said.keys()];
  const nodes = captions.map((caption, index) => {
    if (!words[index].length) return h("span", { class: "muted" }, say("emptyCaption"));
    if (view.colours === "facts") return marked(caption.text, caption.marks, factKind);
    if (view.colours === "reference") {
      const kinds = kindsAgainst(words[index], known);
      return coloured(words[index], (place) => kinds[place]);
    }
    if (view.colours === "runs" && captions.length > 1) {
      return coloured(words[index], (place) => {
        const number = said.get(plainWord(words[index][place]));
        return number === captions.length ? "" : number === 1 ? "only" : "shared";
      });
    }
    return caption.text;
  });
  const isMissed = (word) => !said.has(word) && !spoken.some((other) => isNear(word, other));
  const right = new Set(captions.flatMap((caption) => caption.marks.filter((mark) => mark[3]).map((mark) => mark[2])));
  const references = clip.references.map((reference, index) => {
    if (view.colours === "facts") return index ? reference : marked(reference, clip.reference_marks, ([, , fact]) => (right.has(fact) ? "said" : "missed"));
    const own = wordsOf(reference);
    return view.colours === "reference" && captions.length ? coloured(own, (place) => (isMissed(plainWord(own[place])) ? "missed" : "")) : reference;
  });
  return { nodes, references };
}

function frames(clip) {
  if (!clip.thumbnails.length) {
    const reason = clip.picture_note || (clip.video ? say("unreadable", clip.video) : say("notDrawn"));
    return h("p", { class: "muted small no-picture", title: clip.video }, say("noVideo", clip.picture_note === "full" ? say("notDrawn") : reason));
  }
  if (IS_ONE_RUN) {
    return h("div", { class: "frames film", role: "img", "aria-label": say("filmOf", clip.id) }, clip.thumbnails.map((content, index) =>
      h("img", { src: `data:image/jpeg;base64,${content}`, alt: "", class: index ? null : "now" })));
  }
  return h("div", { class: "frames" }, clip.thumbnails.map((content, index) =>
    h("img", { src: `data:image/jpeg;base64,${content}`, alt: say("frameOf", index + 1, clip.thumbnails.length, clip.id), height: 84 })));
}

// Animates the frames of all clips; when paused and in print, some frames are shown side by side.
function play(isOn) {
  film.isOn = isOn;
  ROOT.dataset.film = isOn ? "on" : "off";
  clearInterval(film.timer);
  if (!isOn) return;
  film.timer = setInterval(() => {
    film.at += 1;
    document.querySelectorAll(".film").forEach((node) => [...node.children].forEach((frame, index, all) => frame.classList.toggle("now", index === film.at % all.length)));
  }, FRAME_MS);
}

function playButton() {
  const button = h("button", { type: "button", id: "play", onclick: () => { play(!film.isOn); button.textContent = say(film.isOn ? "pause" : "play"); } }, say(film.isOn ? "pause" : "play"));
  return button;
}

// A clip with the caption of the single run, and its caption for another clip's video.
function runCard(clip) {
  const [caption] = clip.captions, { nodes, references } = captionNodes(clip, [caption]), numRight = new Set(caption.marks.filter((mark) => mark[3]).map((mark) => mark[2])).size;
  const other = clip.other && (clip.other.text ? (view.colours === "facts" ? marked(clip.other.text, clip.other.marks, factKind) : clip.other.text) : h("span", { class: "muted" }, say("emptyCaption")));
  const row = (kind, name, text) => [h("dt", { class: kind }, name), h("dd", { class: kind, lang: "ko" }, text)];
  return h("article", { class: "clip one", "data-clip": clip.id }, frames(clip), h("div", {},
    h("header", {}, h("h3", {}, clip.id), clip.category ? h("span", { class: "badge" }, clip.category) : null,
      h("span", { class: "muted small" }, `${DATA.labels[DATA.clip_metric] || DATA.clip_metric} ${number(clip.score)}`, clip.reference_marks.length ? ` · ${say("factsRight", numRight, clip.reference_marks.length)}` : "")),
    h("dl", {}, row("said-of", say("captionWord"), nodes[0]), references.map((reference) => row("reference", say("reference"), reference)),
      clip.other ? row("other-video", say("withVideoOf", clip.other.clip), other) : null)));
}

function clipCard(clip) {
  if (IS_ONE_RUN) return runCard(clip);
  const captions = clip.captions.filter((caption) => view.runs.has(caption.run) && RUNS.has(caption.run));
  const { nodes, references } = captionNodes(clip, captions), best = Math.max(...captions.map((caption) => caption.scores[DATA.clip_metric] ?? -Infinity));
  return h("article", { class: "clip", "data-clip": clip.id },
    h("header", {}, h("h3", {}, clip.id), clip.category ? h("span", { class: "badge" }, clip.category) : null,
      h("span", { class: "muted small" }, `${DATA.labels[DATA.clip_metric] || DATA.clip_metric} · ${say("meanScore", number(clip.score))} · ${say("spread", number(clip.spread))}`)),
    frames(clip),
    h("dl", {}, references.map((nodes) => [h("dt", { class: "reference" }, say("reference")), h("dd", { class: "reference", lang: "ko" }, nodes)]),
      captions.map((caption, index) => {
        const run = RUNS.get(caption.run), score = caption.scores[DATA.clip_metric];
        return [h("dt", {}, h("span", {}, swatch(run.group), run.name), h("span", { class: score === best ? "score strong" : "score" }, number(score))), h("dd", { lang: "ko" }, nodes[index])];
      })));
}

function wantedClips() {
  const words = view.text.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (clip) => [clip.id, clip.category, clip.video, ...clip.references, ...clip.captions.map((caption) => caption.text)].join(" ").toLowerCase();
  const sign = { worst: 1, best: -1 }[view.tab];
  const found = DATA.clips.filter((clip) => (view.tab === "all" || clip.chosen.includes(view.tab)) && words.every((word) => text(clip).includes(word)));
  if (sign) found.sort((a, b) => sign * (a.score - b.score));
  if (view.tab === "different") found.sort((a, b) => b.spread - a.spread);
  return found;
}

const TABS = IS_ONE_RUN ? ["all", "worst", "best"] : ["worst", "best", "different", "all"];

const COLOURINGS = [HAS_FACTS ? ["facts", "byFacts"] : null, ["reference", "byReference"], IS_ONE_RUN ? null : ["runs", "byRuns"], ["none", "byNone"]].filter(Boolean);

function clips() {
  const compared = DATA.runs.filter((run) => DATA.clips.some((clip) => clip.captions.some((caption) => caption.run === run.id)));
  const few = () => new Set([...new Map([...compared].reverse().map((run) => [run.group, run.id])).values()].reverse().slice(0, NUM_PICKED));
  if (!view.runs) view.runs = few();
  const section = h("section", { id: "clips" }, h("h2", {}, say(IS_ONE_RUN ? "runClips" : "clips")));
  if (!DATA.clips.length || !compared.length) return fill(section, {}, [h("p", { class: "muted" }, say("noCaptions"))]);
  const list = h("div", { id: "clip-list", role: "tabpanel", "aria-label": say("clips") }), status = h("span", { class: "muted", role: "status" });
  const legend = h("p", { class: "muted small word-legend" }), picker = h("div", { class: "picker", role: "group", "aria-label": say("clipRuns") });
  const more = h("button", { type: "button", class: "more", onclick: () => grow() });
  let matching = [];
  const grow = () => {
    const next = matching.slice(view.shown, view.shown + PAGE_SIZE);
    list.append(...next.map(clipCard));
    view.shown += next.length;
    more.hidden = view.shown >= matching.length;
    more.textContent = say("more", Math.min(PAGE_SIZE, matching.length - view.shown));
  };
  const update = () => {
    matching = wantedClips();
    status.textContent = say("clipCount", matching.length);
    list.replaceChildren();
    if (!matching.length) list.append(h("p", { class: "muted" }, say("noClip")));
    view.shown = 0;
    const kinds = { reference: [["same", "legendSame"], ["near", "legendNear"], ["other", "legendOther"], ["missed", "legendMissed"]], runs: [["only", "legendOnly"], ["shared", "legendShared"]], none: [], facts: [["right", "legendRight"], ["wrong", "legendWrong"], ["missed", "legendMissedFact"]] }[view.colours];
    legend.replaceChildren(...kinds.map(([kind, key]) => h("span", {}, h("span", { class: kind }, say(key)))));
    grow();
  };
  const pick = (runs) => { view.runs = runs; fillPicker(); update(); };
  const fillPicker = () => picker.replaceChildren(
    h("button", { type: "button", onclick: () => pick(few()) }, say("pickFew")), h("button", { type: "button", onclick: () => pick(new Set(compared.map((run) => run.id))) }, say("pickAll")),
    ...compared.map((run) => {
      const box = h("input", { type: "checkbox", onchange: () => { if (!view.runs.delete(run.id)) view.runs.add(run.id); update(); } });
      box.checked = view.runs.has(run.id);
      return h("label", {}, box, swatch(run.group), run.name);
    }));
  const tabs = TABS.filter((tab) => tab === "all" || DATA.clips.some((clip) => clip.chosen.includes(tab)));
  if (!tabs.includes(view.tab)) view.tab = tabs[0];
  const buttons = tabs.map((tab) => h("button", { type: "button", role: "tab", id: `tab-${tab}`, "aria-controls": "clip-list", "aria-selected": String(tab === view.tab), tabindex: tab === view.tab ? "0" : "-1", onclick: () => go(tab) }, say(tab)));
  const go = (tab) => {
    view.tab = tab;
    buttons.forEach((button, index) => { button.setAttribute("aria-selected", String(tabs[index] === tab)); button.tabIndex = tabs[index] === tab ? 0 : -1; });
    update();
  };
  const bar = h("div", { class: "tabs", role: "tablist", "aria-label": say("clips"), onkeydown: (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    const next = (tabs.indexOf(view.tab) + move + tabs.length) % tabs.length;
    go(tabs[next]);
    buttons[next].focus();
  } }, buttons);
  fillPicker();
  update();
  if (IS_ONE_RUN) play(film.isOn);
  return fill(section, {}, [bar,
    h("div", { class: "controls" }, searchBox(say("clipSearch"), view.text, (text) => { view.text = text; update(); }),
      h("label", {}, say("colours"), " ", select(say("colours"), COLOURINGS.map(([name, word]) => [name, say(word)]), view.colours, (value) => { view.colours = value; update(); })), IS_ONE_RUN ? playButton() : null, status),
    IS_ONE_RUN ? null : h("details", { class: "pick", open: compared.length <= 8 }, h("summary", {}, say("clipRuns")), picker), legend, list, more]);
}
