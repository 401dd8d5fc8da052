"""The reference package's own scorers stand in for ours under the same keys."""

from __future__ import annotations

import math

import pytest

from vlmcap.metrics import STANDARD_METRICS, score_captions
from vlmcap.metrics.backend import COCO_METRICS, score_with

PREDICTIONS = ["넓은 바다에 파도가 밀려온다.", "사람들이 길을 걷는다.", "", "A dog isn't running."]
REFERENCES = [
    ["바다에 파도가 친다.", "넓은 바닷가에 파도가 밀려오고 있다."],
    ["사람들이 해변을 천천히 걷는다."],
    ["해가 진다."],
    ["A dog runs.", "The dog is not running."],
]


@pytest.mark.parametrize("tokenizer", ["mecab_ko", "char", "whitespace", "ptb"])
def test_both_backends_agree_under_the_same_keys(tokenizer: str) -> None:
    native = score_with("native", PREDICTIONS, REFERENCES, tokenizer=tokenizer)
    coco = score_with("pycocoevalcap", PREDICTIONS, REFERENCES, tokenizer=tokenizer)
    assert native == score_captions(PREDICTIONS, REFERENCES, tokenizer=tokenizer)
    assert list(coco) == list(native) == list(STANDARD_METRICS)
    assert coco == pytest.approx(native, rel=1e-9, abs=1e-9, nan_ok=True)


def test_the_reference_package_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    monkeypatch.setattr(Bleu, "compute_score", lambda self, truth, results, verbose: ([0.1, 0.2, 0.3, 0.4], []))
    monkeypatch.setattr(Cider, "compute_score", lambda self, truth, results: (5.0, []))
    monkeypatch.setattr(Rouge, "compute_score", lambda self, truth, results: (0.6, []))
    scores = score_with("pycocoevalcap", PREDICTIONS, REFERENCES, tokenizer="char")
    assert {name: scores[name] for name in COCO_METRICS} == dict(
        zip(COCO_METRICS, (0.1, 0.2, 0.3, 0.4, 5.0, 0.6), strict=True)
    )
    native = score_captions(PREDICTIONS, REFERENCES, tokenizer="char")
    assert {name: scores[name] for name in native if name not in COCO_METRICS} == pytest.approx(
        {name: native[name] for name in native if name not in COCO_METRICS}
    ), "CIDEr without the penalty is ours"


def test_only_what_is_asked_for_comes_back_in_its_order() -> None:
    for wanted in (["rouge_l", "cider", "bleu_2"], ["bleu_4"], ["cider"], []):
        assert list(score_with("pycocoevalcap", PREDICTIONS, REFERENCES, tokenizer="char", metrics=wanted)) == wanted


def test_a_single_clip_has_the_packages_zero() -> None:
    with pytest.warns(UserWarning, match="NaN"):
        scores = score_with(
            "pycocoevalcap", ["바다"], [["바다"]], tokenizer="char", metrics=["cider", "cider_d", "rouge_l"]
        )
    assert math.isnan(scores["cider"])
    assert (scores["cider_d"], scores["rouge_l"]) == (0.0, 1.0)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="Unknown backend 'coco'; choose one of native, pycocoevalcap"):
        score_with("coco", PREDICTIONS, REFERENCES)
    with pytest.raises(ValueError, match="Unknown metric 'spice'"):
        score_with("pycocoevalcap", PREDICTIONS, REFERENCES, tokenizer="char", metrics=["spice"])
    with pytest.raises(ValueError, match="list of names"):
        score_with("pycocoevalcap", PREDICTIONS, REFERENCES, tokenizer="char", metrics="cider")
    with pytest.raises(ValueError, match="have no tokens"):
        score_with("pycocoevalcap", ["a", "b"], [[""], [" "]], tokenizer="char", metrics=["bleu_4"])
    with pytest.raises(ValueError, match="Clip 0 has no reference"):
        score_with("pycocoevalcap", ["a"], [[]])
