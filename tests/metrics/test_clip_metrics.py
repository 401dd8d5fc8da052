"""Scores by name from texts equal those that `score_captions` and the others give."""

from __future__ import annotations

import random

import pytest

from vlmcap.demo.grammar import FACTS, describe, draw_scene
from vlmcap.errors import UserError
from vlmcap.metrics import FactLexicon, fact_accuracy, score_captions
from vlmcap.metrics.clip_metrics import clip_scores, is_clip_score
from vlmcap.metrics.significance import bootstrap
from vlmcap.metrics.tokenizers import get_tokenizer

NAMES = ["bleu_1", "bleu_4", "cider", "cider_d", "rouge_l", "meteor", "meteor_ko", "content_f1"]


@pytest.fixture(scope="module")
def corpus() -> tuple[list[str], list[list[str]]]:
    rng = random.Random(3)
    scenes = [draw_scene(rng) for _ in range(12)]
    said = [describe(scene if index % 3 else scenes[0], rng) for index, scene in enumerate(scenes)]
    return said, [[describe(scene, rng), describe(scene, rng)] for scene in scenes]


@pytest.mark.parametrize("name", NAMES)
def test_a_score_by_name(corpus: tuple[list[str], list[list[str]]], name: str) -> None:
    predictions, references = corpus
    metric = clip_scores(name, predictions, references, tokenizer=get_tokenizer("mecab_ko"))[name]
    assert metric.name == name
    assert metric.corpus_score() == pytest.approx(score_captions(predictions, references, metrics=[name])[name])
    assert len(metric.values) == 12
    assert is_clip_score(name)


def test_facts(corpus: tuple[list[str], list[list[str]]]) -> None:
    predictions, references = corpus
    lexicon = FactLexicon.from_dict(FACTS | {"never": {"없음": ["결코 나오지 않는 말"]}})
    metrics = clip_scores("facts/mean", predictions, references, tokenizer=get_tokenizer("char"), lexicon=lexicon)
    expected = fact_accuracy(predictions, references, lexicon)
    assert metrics.keys() == {f"facts/{fact}" for fact in expected}
    for fact, value in expected.items():
        assert metrics[f"facts/{fact}"].corpus_score() == pytest.approx(value, nan_ok=True), fact
    interval = bootstrap(metrics["facts/mean"], resamples=200)
    assert 0 < interval.low < interval.score < interval.high <= 1


def test_what_is_no_score_of_clips(corpus: tuple[list[str], list[list[str]]]) -> None:
    for name in ("self_bleu", "loss", "facts/mean"):  # no lexicon
        with pytest.raises(UserError, match="not a score of clips"):
            clip_scores(name, *corpus, tokenizer=get_tokenizer("char"))
    assert not is_clip_score("distinct_ratio")
    with pytest.raises(UserError, match="there is no fact colours"):
        clip_scores("facts/colours", *corpus, tokenizer=get_tokenizer("char"), lexicon=FactLexicon.from_dict(FACTS))
