"""Scores of long Korean captions: exact prefixes of the reference, and two runs that differ slightly.

    python benchmarks/metrics/long_captions.py FOLDER

The captions are made by a small grammar, with 13 sentences and some 580 characters each, as long as those of the AI Hub
data; the prediction files stay in FOLDER for `python -m vlmcap.metrics`. docs/explanation/korean_scores.md
shows the output.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from vlmcap.metrics import get_tokenizer
from vlmcap.metrics.clip_metrics import clip_metrics
from vlmcap.metrics.corpus import ClipStatistics, ReferenceCorpus, clip_statistics, corpus_scores
from vlmcap.metrics.significance import bootstrap, paired_bootstrap

NUM_CLIPS, NUM_SENTENCES = 1000, 13
WORDS = {
    "place": [
        "바닷가",
        "숲길",
        "시골마을",
        "도심거리",
        "강변",
        "산등성이",
        "항구",
        "논밭",
        "공원",
        "계곡",
        "호숫가",
        "시장골목",
    ],
    "subject": [
        "사람들이",
        "아이들이",
        "자동차가",
        "자전거가",
        "배가",
        "새떼가",
        "강아지가",
        "할머니가",
        "어부가",
        "등산객이",
        "기차가",
        "나룻배가",
    ],
    "colour": ["붉은색", "푸른색", "노란색", "흰색", "검은색", "초록색", "주황색", "보라색", "회색", "갈색"],
    "direction": ["왼쪽에서 오른쪽으로", "오른쪽에서 왼쪽으로", "위에서 아래로", "앞에서 뒤로", "뒤에서 앞으로"],
    "time": ["새벽", "아침", "한낮", "해질녘", "밤", "늦가을", "한겨울", "초여름"],
}
SENTENCES = [
    "화면에는 {time}의 {place} 풍경이 넓게 펼쳐져 있으며 하늘은 {colour}으로 물들어 있습니다.",
    "{subject} {direction} 천천히 움직이고 있고 그 뒤로 {place}의 모습이 보입니다.",
    "카메라는 {direction} 이동하면서 {colour} 지붕의 건물과 {place}을 차례로 보여 줍니다.",
    "가까운 곳에는 {colour} 옷을 입은 인물이 서 있고 멀리 {subject} 지나갑니다.",
    "바람이 불 때마다 {place} 주변의 {colour} 나뭇잎이 흔들리는 장면이 이어집니다.",
    "{time}이 되자 빛이 바뀌면서 {colour} 그림자가 {direction} 길게 드리워집니다.",
    "화면 아래쪽에는 '{place} {number}번길'이라는 {colour} 글자가 {number}초 동안 나타납니다.",
    "전체적으로 {time}의 고요한 분위기 속에서 {subject} 서로 어울리는 모습입니다.",
]


def sentence(rng: random.Random) -> str:
    return rng.choice(SENTENCES).format(
        number=rng.randint(2, 60), **{name: rng.choice(words) for name, words in WORDS.items()}
    )


def make_runs(rng: random.Random) -> tuple[list[str], dict[str, list[str]]]:
    """Makes references, and predictions of each run: prefixes, and two runs with a share of the sentences replaced."""
    clips = [[sentence(rng) for _ in range(NUM_SENTENCES)] for _ in range(NUM_CLIPS)]
    references = [" ".join(clip) for clip in clips]
    runs = {
        f"prefix-{percent}": [text[: len(text) * percent // 100] for text in references]
        for percent in (100, 95, 90, 80)
    }
    errors = [rng.betavariate(2, 2) for _ in clips]  # some clips are harder than others, for both runs
    for name, gain in (("run-a", 0.0), ("run-b", 0.02)):
        said = [
            [sentence(rng) if rng.random() < share - gain else text for text in clip]
            for clip, share in zip(clips, errors, strict=True)
        ]
        runs[name] = [" ".join(parts) for parts in said]
    return references, runs


def show_difference(first: ClipStatistics, second: ClipStatistics, num_clips: int) -> None:
    rows = range(num_clips)
    one, other = clip_metrics(first.take(rows)), clip_metrics(second.take(rows))
    for name in ("bleu_4", "cider", "rouge_l"):
        interval, change = bootstrap(one[name]), paired_bootstrap(one[name], other[name])
        print(
            f"{num_clips:5}  {name:8} {interval.score:7.4f} [{interval.low:.4f}, {interval.high:.4f}]   "
            f"{change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]  p = {change.p_value:.3f}"
        )


def main(folder: Path) -> None:
    references, runs = make_runs(random.Random(0))
    split = get_tokenizer("mecab_ko")
    corpus = ReferenceCorpus([[split(text)] for text in references])
    folder.mkdir(parents=True, exist_ok=True)
    num_characters = sum(map(len, references)) / len(references)
    lengths = f"{num_characters:.0f} characters, {corpus_length(references):.0f} tokens per caption"
    print(
        f"{len(references)} clips, {lengths}, tokens by {split.version}\n\nrun           BLEU-4   CIDEr  CIDEr-D  "
        "ROUGE-L"
    )
    statistics = {}
    for name, texts in runs.items():
        rows = ({"id": f"{i:04d}", "prediction": texts[i], "references": [references[i]]} for i in range(len(texts)))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        statistics[name] = clip_statistics([split(text) for text in texts], corpus)
        s = corpus_scores(statistics[name])
        print(f"{name:12} {s['bleu_4']:7.4f} {s['cider']:7.4f}  {s['cider_d']:7.4f}  {s['rouge_l']:7.4f}")
    print("\nclips  score     run-a [95 % interval]      run-b less run-a [95 % interval]")
    for num_clips in (1000, 200):
        show_difference(statistics["run-a"], statistics["run-b"], num_clips)


def corpus_length(texts: list[str]) -> float:
    split = get_tokenizer("mecab_ko")
    return sum(len(split(text)) for text in texts) / len(texts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/metrics/long_captions.py FOLDER")
    main(Path(sys.argv[1]))
