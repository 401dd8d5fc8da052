"""A user's own metrics: one number or one per clip, in every score, and what is wrong with them in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.plugins import own_registries
from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.metrics.user_metrics import register_metric, user_metrics, user_scores, user_scores_each
from vlmcap.training.callbacks.scorer import CaptionScorer, Prediction, write_predictions
from vlmcap.training.checks import check_monitor
from vlmcap.types import Clip

TEXTS, REFERENCES = ["바다.", "산이다!", ""], [["바다다."], ["산.", "큰 산."], ["밤."]]


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with own_registries(monkeypatch):
        yield


def test_a_score_is_a_number_or_the_mean_of_one_per_clip() -> None:
    register_metric("clips_said")(lambda predictions, references: sum(map(bool, predictions)))
    register_metric("lengths")(lambda predictions, references: np.array([len(text) for text in predictions]))
    register_metric("of_numpy")(lambda predictions, references: np.float64(0.5))
    assert user_metrics() == ("clips_said", "lengths", "of_numpy")
    assert user_scores(TEXTS, REFERENCES) == {"clips_said": 2.0, "lengths": 7 / 3, "of_numpy": 0.5}
    assert user_scores_each(TEXTS, REFERENCES) == [{"lengths": 3.0}, {"lengths": 4.0}, {"lengths": 0.0}]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda predictions, references: [1.0], r"the metric wrong gives 1 numbers for 3 clips"),
        (lambda predictions, references: 1 / 0, r"the metric wrong failed \(ZeroDivisionError: division by zero\)"),
        (lambda predictions, references: None, r"the metric wrong failed \(TypeError"),
        (lambda predictions, references: "good", r"the metric wrong failed \(ValueError"),
    ],
)
def test_what_gives_no_number_is_refused_in_words(metric: Any, words: str) -> None:
    register_metric("wrong")(metric)
    with pytest.raises(UserError, match=words) as error:
        user_scores(TEXTS, REFERENCES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cider", "loss", "a/b", ""])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="choose a new name"):
        register_metric(name)


def test_it_stands_in_scores_and_predictions_and_may_be_monitored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="monitor=val/marks is not measured while training"):
        check_monitor(compose(["monitor=val/marks"]))
    register_metric("marks")(lambda predictions, references: [text.count("!") for text in predictions])
    check_monitor(compose(["monitor=val/marks"]))
    rows = [
        Prediction(Clip(str(index), "x.mp4", tuple(refs)), text)
        for index, (text, refs) in enumerate(zip(TEXTS, REFERENCES, strict=True))
    ]
    scorer = CaptionScorer(compose(["evaluation.tokenizer=char"]).evaluation)
    assert scorer.score(rows, metrics=["bleu_1"])["marks"] == pytest.approx(1 / 3)
    write_predictions(tmp_path / "p.jsonl", rows, scorer.tokenizer)
    lines = [json.loads(line)["scores"]["marks"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines == [0.0, 1.0, 0.0]
