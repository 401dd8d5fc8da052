"""`score_captions` and `score_each`: what goes wrong when Korean captions are scored, and must not here."""

from __future__ import annotations

import math
import unicodedata
import warnings
from typing import Any

import pytest

from vlmcap.errors import UserError
from vlmcap.metrics import (
    METRIC_LABELS,
    METRIC_NAMES,
    STANDARD_METRICS,
    TOKENIZER_NAMES,
    get_tokenizer,
    score_captions,
    score_each,
)

CAPTIONS = [
    "바닷가에서 파도가 천천히 밀려옵니다.",
    "사람이 왼쪽에서 오른쪽으로 걸어갑니다.",
    "붉은 해가 산 너머로 지고 있습니다.",
    "도시의 밤거리에 자동차 불빛이 흐릅니다.",
    "눈 덮인 숲길을 카메라가 지나갑니다.",
    "아이가 공원에서 파란 풍선을 들고 뜁니다.",
]
REFERENCES = [[caption] for caption in CAPTIONS]
OVERLAP = [name for name in STANDARD_METRICS if name not in ("distinct_ratio", "length_ratio")]
PERFECT = {"cider": 10.0, "cider_d": 10.0, "chrf": 100.0}


def long_captions() -> list[str]:
    """Eight captions of about 250 morphemes, each with words of its own."""
    nouns = [
        "바다",
        "산",
        "숲",
        "강",
        "도시",
        "마을",
        "공원",
        "시장",
        "다리",
        "학교",
        "역",
        "항구",
        "골목",
        "들판",
        "호수",
        "계곡",
    ]
    verbs = ["보입니다", "흐릅니다", "지나갑니다", "나타납니다", "사라집니다", "움직입니다", "빛납니다"]
    return [
        " ".join(
            f"화면의 {nouns[(c * 3 + s * 5) % 16]}에 {nouns[(c * 7 + s) % 16]}이 {verbs[(c + s * s) % 7]}."
            for s in range(36)
        )
        for c in range(8)
    ]


@pytest.mark.parametrize("tokenizer", TOKENIZER_NAMES)
def test_identical_captions_are_perfect(tokenizer: str) -> None:
    scores = score_captions(CAPTIONS, REFERENCES, tokenizer=tokenizer)
    assert list(scores) == list(STANDARD_METRICS)
    # BLEU's smoothing constants take 1e-9 off each n-gram count.
    assert scores == pytest.approx({name: PERFECT.get(name, 1.0) for name in STANDARD_METRICS}, abs=1e-8)


@pytest.mark.parametrize("tokenizer", TOKENIZER_NAMES)
def test_captions_with_nothing_in_common_score_nothing(tokenizer: str) -> None:
    # The small p_k of BLEU, a full stop in METEOR and chrF: hence no full stops, and room for the constants.
    scores = score_captions(
        ["가나", "다라", "마바"], [["xyz uvw"], ["rst opq"], ["lmn hij"]], tokenizer=tokenizer, metrics=OVERLAP
    )
    assert scores == pytest.approx(dict.fromkeys(OVERLAP, 0.0), abs=1e-5)


@pytest.mark.parametrize("line_break", ["\r", "\v", "\f", "\x85", "\u2028", "\u2029", "\n"])
def test_a_line_separator_in_one_caption_shifts_no_other_pair(line_break: str) -> None:
    broken = [CAPTIONS[0].replace(" ", line_break), *CAPTIONS[1:]]
    assert score_captions(broken, REFERENCES) == score_captions(CAPTIONS, REFERENCES)
    assert score_captions(CAPTIONS, [[caption] for caption in broken]) == score_captions(CAPTIONS, REFERENCES)


def test_decomposed_predictions_score_as_composed_ones() -> None:
    decomposed = [unicodedata.normalize("NFD", caption) for caption in CAPTIONS]
    assert decomposed[0] != CAPTIONS[0]
    assert score_captions(decomposed, REFERENCES) == score_captions(CAPTIONS, REFERENCES)


def test_invisible_characters_do_not_make_captions_distinct() -> None:
    predictions = ["바다", "바다\u200b", " 바다\u2028", unicodedata.normalize("NFD", "바다"), "산"]
    scores = score_captions(predictions, [["바다"]] * 5, metrics=["distinct_ratio"])
    assert scores == {"distinct_ratio": 2 / 5}


def test_length_penalty_makes_cider_d_useless_for_long_captions_and_cider_keeps_its_value() -> None:
    captions = long_captions()
    assert min(len(get_tokenizer("mecab_ko")(caption)) for caption in captions) > 200
    prefixes = [caption[: len(caption) * 9 // 10] for caption in captions]
    scores = score_captions(prefixes, [[caption] for caption in captions], metrics=["cider", "cider_d", "length_ratio"])
    assert scores["cider_d"] < 0.1
    assert scores["cider"] > 8
    assert scores["length_ratio"] == pytest.approx(0.9, abs=0.02)


def test_means_of_batches_are_not_the_corpus_score() -> None:
    # Clips of different batches share words, as captions of one data set do: rare in each batch, common in the corpus.
    references = [[f"안개가 낀 이른 아침에 {caption}" if i % 2 else caption] for i, caption in enumerate(CAPTIONS)]
    predictions = [
        CAPTIONS[0],
        CAPTIONS[1],
        CAPTIONS[2],
        "안개가 낀 도시의 밤거리",
        CAPTIONS[4],
        "아침에 아이가 풍선을 들고 있습니다.",
    ]
    names = ["bleu_4", "cider", "cider_d", "meteor", "rouge_l"]
    corpus = score_captions(predictions, references, metrics=names)
    batches = [score_captions(predictions[i : i + 2], references[i : i + 2], metrics=names) for i in (0, 2, 4)]
    for name in names:
        mean = sum(batch[name] for batch in batches) / 3
        if name == "rouge_l":  # the one that is a mean over clips, so the test can tell the difference
            assert mean == pytest.approx(corpus[name])
        else:
            assert abs(mean / corpus[name] - 1) > 0.01, name


def test_tokenizers_give_different_scores() -> None:
    predictions = [caption.replace("니다.", "니다!") for caption in CAPTIONS]
    scores = {
        name: score_captions(predictions, REFERENCES, tokenizer=name, metrics=["bleu_4"])["bleu_4"]
        for name in TOKENIZER_NAMES
    }
    assert len({round(score, 3) for score in scores.values()}) >= 4
    assert scores["mecab_ko"] > scores["whitespace"]


def test_a_collapsed_model_is_seen() -> None:
    scores = score_captions([CAPTIONS[0]] * 6, REFERENCES, metrics=["distinct_ratio", "bleu_1"])
    assert scores["distinct_ratio"] == pytest.approx(1 / 6)
    assert scores["bleu_1"] > 0.2


def test_length_ratio_takes_the_closest_reference_and_the_shorter_of_two() -> None:
    def ratio(prediction: str, references: list[str]) -> float:
        return score_captions([prediction], [references], tokenizer="whitespace", metrics=["length_ratio"])[
            "length_ratio"
        ]

    assert ratio("가 나 다", ["가", "가 나 다 라", "가 나 다 라 마 바"]) == pytest.approx(3 / 4)
    assert ratio("가 나 다", ["가 나 다 라", "가 나"]) == pytest.approx(3 / 2)
    assert ratio("", ["가 나"]) == 0
    assert math.isnan(ratio("가", [""]))


def test_empty_predictions_count_as_wrong() -> None:
    predictions = ["", *CAPTIONS[1:]]
    scores = score_captions(predictions, REFERENCES, metrics=["cider", "rouge_l"])
    assert scores == pytest.approx({"cider": 10 * 5 / 6, "rouge_l": 5 / 6})
    nothing = score_captions([""] * 6, REFERENCES)
    assert nothing.pop("distinct_ratio") == pytest.approx(1 / 6)
    assert nothing == pytest.approx(dict.fromkeys(nothing, 0.0), abs=1e-9)


def test_one_caption_alone_has_no_cider_and_says_so_once() -> None:
    with pytest.warns(UserWarning, match="a single clip") as caught:
        scores = score_captions(CAPTIONS[:1], REFERENCES[:1])
    assert len(caught) == 1
    assert math.isnan(scores["cider"])
    assert math.isnan(scores["cider_d"])
    assert scores["bleu_4"] == pytest.approx(1)
    with pytest.warns(UserWarning, match="a single clip"):
        assert math.isnan(score_each(CAPTIONS[:1], REFERENCES[:1])[0]["cider"])


def test_no_warning_where_cider_is_not_asked_for_or_defined() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_captions(CAPTIONS[:1], REFERENCES[:1], metrics=["bleu_4", "chrf"])
        score_captions(CAPTIONS, REFERENCES)


def test_only_what_is_asked_for_is_computed() -> None:
    def refuse(text: str) -> list[str]:
        raise AssertionError(text)

    assert list(score_captions(CAPTIONS, REFERENCES, metrics=["rouge_l", "bleu_2"])) == ["rouge_l", "bleu_2"]
    assert score_captions(CAPTIONS, REFERENCES, metrics=[]) == {}
    untouched = type(get_tokenizer("char"))("none", "none", refuse)
    assert score_captions(CAPTIONS, REFERENCES, tokenizer=untouched, metrics=["chrf", "distinct_ratio"])["chrf"] == 100


def test_each_caption_gets_its_share_of_the_corpus_score() -> None:
    predictions = [CAPTIONS[0], CAPTIONS[0], "", "도시의 밤거리", CAPTIONS[4], "아이가 풍선을 들고 있습니다."]
    rows = score_each(predictions, REFERENCES, tokenizer="mecab_ko")
    corpus = score_captions(predictions, REFERENCES)
    assert [set(row) for row in rows] == [{"cider", "cider_d", "rouge_l", "bleu_4"}] * 6
    for name in ("cider", "cider_d", "rouge_l"):
        assert sum(row[name] for row in rows) / 6 == pytest.approx(corpus[name])
    assert rows[0]["bleu_4"] == pytest.approx(1)
    assert rows[0]["cider"] > rows[5]["cider"] > rows[2]["cider"] == 0


def test_every_metric_has_a_label_and_cider_says_what_it_leaves_out() -> None:
    assert list(METRIC_LABELS) == list(METRIC_NAMES) == list(score_captions(CAPTIONS, REFERENCES, metrics=METRIC_NAMES))
    assert METRIC_LABELS["cider"] == "CIDEr (no length penalty)"
    assert len(set(METRIC_LABELS.values())) == len(METRIC_LABELS)


WRONG: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "empty corpus": ([], [], {}, "no captions to score"),
    "unequal": (["가", "나"], [["가"]], {}, "2 predictions but 1 lists"),
    "prediction None": (["가", None], [["가"], ["나"]], {}, "prediction of clip 1 is None"),
    "prediction a number": ([3], [["가"]], {}, "prediction of clip 0 is a int"),
    "predictions None": (None, [["가"]], {}, "predictions must be a list"),
    "predictions a text": ("가", [["가"]], {}, "predictions must be a list"),
    "references None": (["가"], None, {}, "references must be a list"),
    "reference None": (["가"], [[None]], {}, "A reference of clip 0 is None"),
    "references of a clip None": (["가"], [None], {}, "references of clip 0 are None"),
    "references not in a list": (["가"], ["가"], {}, "references of clip 0 are a single text"),
    "no reference": (["가", "나"], [["가"], []], {}, "Clip 1 has no reference"),
    "unknown tokenizer": (["가"], [["가"]], {"tokenizer": "mecab"}, "choose one of mecab_ko"),
    "unknown metric": (["가"], [["가"]], {"metrics": ["bleu"]}, "choose among bleu_1, bleu_2"),
    "metric not in a list": (["가"], [["가"]], {"metrics": "cider"}, r"write \['cider'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_end_in_one_sentence(case: str) -> None:
    predictions, references, options, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        score_captions(predictions, references, **options)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    if "metrics" not in options:
        with pytest.raises(UserError, match=message):
            score_each(predictions, references, **options)
