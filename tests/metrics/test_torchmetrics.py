"""The Metric class scores the gathered corpus once: batches, ranks, copies and resets change no digit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmcap.errors import UserError
from vlmcap.metrics import score_captions
from vlmcap.metrics.torchmetrics import CaptionScore

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("bleu_1", "bleu_4", "cider", "cider_d", "rouge_l", "meteor", "chrf", "distinct_ratio", "length_ratio")
WORDS = [
    "바다에",
    "파도가",
    "사람이",
    "왼쪽으로",
    "달린다.",
    "천천히",
    "\u2028",
    "새가\r",
    "A dog",
    '"KBS"',
    "하늘을",
    "난다.",
]


def make_corpus(count: int = 11) -> tuple[list[str], list[list[str]], list[str]]:
    predictions = [" ".join(WORDS[(i * k) % 12] for k in range(1, 9)) for i in range(count)]
    references = [
        [" ".join(WORDS[(i * k + n) % 12] for k in range(1, 8 + n)) for n in range(1 + i % 3)] for i in range(count)
    ]
    return predictions, references, [f"clip-{i:02d}" for i in range(count)]


def values(metric: CaptionScore) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_batches_are_scored_as_one_corpus_to_the_last_digit() -> None:
    predictions, references, ids = make_corpus()
    whole, parts = CaptionScore("char", NAMES), CaptionScore("char", NAMES)
    whole.update(predictions, references, ids)
    for rows in (slice(7, None), slice(0, 2), slice(2, 7)):
        parts.update(predictions[rows], references[rows], ids[rows])
    assert values(whole) == values(parts)
    assert tuple(values(whole)) == NAMES
    assert values(whole) == score_captions(
        predictions, references, tokenizer="char", metrics=NAMES
    )  # already in the order of ids
    assert all(value.dtype == torch.float64 for value in whole.compute().values())


def test_without_ids_every_caption_counts_in_any_order() -> None:
    predictions, references, _ = make_corpus()
    first, second = CaptionScore("char", NAMES), CaptionScore("char", NAMES)
    first.update(predictions, references)
    second.update(predictions[::-1], references[::-1])
    assert values(first) == values(second)
    assert values(first) == pytest.approx(
        score_captions(predictions, references, tokenizer="char", metrics=NAMES), abs=1e-12
    )
    second.update(predictions[:1], references[:1])
    assert len(second.corpus()) == 12


def test_a_clip_that_a_sampler_repeats_counts_once() -> None:
    predictions, references, ids = make_corpus()
    metric = CaptionScore("char", ["cider"])
    metric.update(predictions, references, ids)
    before = values(metric)
    metric.update(predictions[3:5], references[3:5], ids[3:5])
    assert values(metric) == before
    assert [name for name, _, _ in metric.corpus()] == ids


def test_two_clips_under_one_id_are_refused() -> None:
    metric = CaptionScore("char")
    metric.update(["a", "b"], [["a"], ["b"]], ["x", "x"])
    with pytest.raises(ValueError, match="different references have the id 'x'"):
        metric.compute()


def test_it_pickles_resets_and_survives_half_precision() -> None:
    predictions, references, ids = make_corpus()
    metric = CaptionScore("char", NAMES)
    metric.update(predictions[:6], references[:6], ids[:6])
    copy = pickle.loads(pickle.dumps(metric))
    for one in (metric, copy):
        one.update(predictions[6:], references[6:], ids[6:])
    assert values(copy) == values(metric)
    assert copy.corpus() == list(zip(ids, predictions, references, strict=True)), "texts come back as they were"
    copy.set_dtype(torch.float16)
    assert copy.corpus() == metric.corpus()
    metric.reset()
    assert metric.corpus() == []
    with pytest.raises(ValueError, match="no captions to score"):
        metric.compute()
    metric.update(predictions[:4], references[:4], ids[:4])
    assert len(metric.corpus()) == 4


def test_mistakes_are_told_when_they_are_made() -> None:
    for arguments, told in (
        (("korean",), "Unknown tokenizer 'korean'"),
        (("char", ["cidre"]), "metrics must be a list .* not \\['cidre'\\]"),
        (("char", "cider"), "metrics must be a list .* not 'cider'"),
    ):
        with pytest.raises(ValueError, match=told):
            CaptionScore(*arguments)
    with pytest.raises(ValueError, match="Unknown backend 'coco'"):
        CaptionScore("char", backend="coco")
    metric = CaptionScore("char")
    with pytest.raises(ValueError, match="2 predictions but 1 lists"):
        metric.update(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="1 predictions but 2 ids"):
        metric.update(["a"], [["a"]], ["x", "y"])
    with pytest.raises(ValueError, match="reference of clip 0 is None"):
        metric.update(["a"], [[None]])  # type: ignore[list-item]
    assert metric.corpus() == []


EVEN_AND_ODD = [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]
CASES: list[tuple[list[list[int]], bool, str]] = [  # the clips of each rank, whether they have ids, the backend
    ([[8, 3, 10, 1, 0, 2, 9, 5], [4, 7, 6]], True, "native"),
    ([list(range(11)), []], True, "native"),
    ([[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 0]], True, "native"),  # clip 0 twice, as samplers pad
    (EVEN_AND_ODD, False, "native"),
    (EVEN_AND_ODD, True, "pycocoevalcap"),
]
PROCESS = """
import json, sys
import torch.distributed as dist
from tests.metrics.test_torchmetrics import CASES, NAMES, make_corpus, values
from vlmcap.metrics.torchmetrics import CaptionScore

meeting, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
predictions, references, ids = make_corpus()
found = []
for shards, has_ids, backend in CASES:
    metric = CaptionScore("char", NAMES, backend=backend)
    for row in shards[rank]:
        metric.update(predictions[row : row + 1], references[row : row + 1], ids[row : row + 1] if has_ids else None)
    found.append(values(metric))
    assert len(metric.corpus()) == len(shards[rank]), "its own clips are all that a rank keeps"
    metric.update([], [])
    assert values(metric) == found[-1]
print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_score_as_one_to_the_last_digit(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", PROCESS, str(tmp_path / "meeting"), str(rank)] for rank in (0, 1)]
    processes = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") for c in commands]
    try:
        printed = [json.loads(process.communicate(timeout=240)[0].strip().splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    predictions, references, ids = make_corpus()
    assert printed[0] == printed[1]
    for (_, has_ids, backend), scores in zip(CASES, printed[0], strict=True):
        alone = CaptionScore("char", NAMES, backend=backend)
        alone.update(predictions, references, ids if has_ids else None)
        assert scores == values(alone)


def test_width_and_synonyms_are_passed_on() -> None:
    pair = (["해변까지 ３ｋｍ"], [["바닷가까지 3km"]])
    values = []
    for options in ({}, {"normalize_fullwidth": True, "synonyms": {"해변": ["바닷가"]}}):
        score = CaptionScore(metrics=["bleu_1", "content_recall"], **options)
        score.update(*pair)
        values.append(score.compute())
    assert values[1]["bleu_1"] > values[0]["bleu_1"]
    assert values[1]["content_recall"] > values[0]["content_recall"]
    with pytest.raises(UserError, match="list of equivalent words"):
        CaptionScore(synonyms={"해변": "바닷가"})  # type: ignore[dict-item]
