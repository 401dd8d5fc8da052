"""The same numbers as the reference implementations, given the same tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics import CHRF

from tests.metrics import reference
from vlmcap.metrics.corpus import ClipStatistics, ReferenceCorpus, clip_statistics, corpus_scores
from vlmcap.metrics.meteor import corpus_meteor, sentence_meteor
from vlmcap.metrics.ngram_scores import bleu_from_counts
from vlmcap.metrics.scores import corpus_chrf
from vlmcap.metrics.tokenizers import get_tokenizer

Corpus = tuple[list[list[str]], list[list[list[str]]]]

KOREAN = ["바다", "에서", "사람", "이", "가", "달린다", "왼쪽", "으로", "."]
ENGLISH = ["a", "dog", "runs", "on", "the", "beach", "slowly"]


def corpora() -> st.SearchStrategy[Corpus]:
    """Two to six clips of one to five references, over few words so that much matches.

    Captions of no and of one token among them.
    """
    captions = st.sampled_from([KOREAN, ENGLISH]).flatmap(lambda words: st.lists(st.sampled_from(words), max_size=12))
    clips = st.tuples(captions, st.lists(captions, min_size=1, max_size=5))
    return st.lists(clips, min_size=2, max_size=6).map(
        lambda drawn: ([h for h, _ in drawn], [refs for _, refs in drawn])
    )


def with_duplicates(corpus: Corpus) -> Corpus:
    """The corpus with its first clip repeated, and a clip whose prediction is its own reference."""
    hypotheses, references = corpus
    return [*hypotheses, hypotheses[0], references[-1][0]], [*references, references[0], references[-1]]


def for_coco(corpus: Corpus) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    hypotheses, references = corpus
    truth = {index: [" ".join(tokens) for tokens in refs] for index, refs in enumerate(references)}
    return truth, {index: [" ".join(tokens)] for index, tokens in enumerate(hypotheses)}


def close(expected: object) -> object:
    return pytest.approx(expected, rel=1e-9, abs=1e-9)


def check_against_reference(corpus: Corpus) -> ClipStatistics:
    """The fast code against the readable one, clip by clip."""
    statistics = clip_statistics(corpus[0], ReferenceCorpus(corpus[1]))
    scores, each = corpus_scores(statistics), reference.sentence_cider(*corpus)
    assert [scores[f"bleu_{order}"] for order in range(1, 5)] == close(reference.corpus_bleu(*corpus))
    assert bleu_each(statistics) == [close(row) for row in reference.sentence_bleu(*corpus)]
    assert statistics.cider.tolist() == close([score.cider for score in each])
    assert statistics.cider_d.tolist() == close([score.cider_d for score in each])
    assert (scores["cider"], scores["cider_d"]) == close(tuple(reference.corpus_cider(*corpus)))
    assert statistics.rouge_l.tolist() == close(reference.sentence_rouge_l(*corpus))
    counted = [reference.bleu_statistics(hypothesis, refs) for hypothesis, refs in zip(*corpus, strict=True)]
    for name in ("matches", "ngrams", "hypothesis_length", "reference_length"):
        assert getattr(statistics, name).tolist() == [
            list(value) if isinstance(value := getattr(c, name), tuple) else value for c in counted
        ], name
    return statistics


def bleu_each(statistics: ClipStatistics) -> list[list[float]]:
    s = statistics
    return bleu_from_counts(s.matches, s.ngrams, s.hypothesis_length, s.reference_length).tolist()


def check_against_coco(corpus: Corpus) -> None:
    statistics = check_against_reference(corpus)
    scores = corpus_scores(statistics)
    truth, results = for_coco(corpus)
    bleu, bleu_rows = Bleu(4).compute_score(truth, results, verbose=0)
    assert [scores[f"bleu_{order}"] for order in range(1, 5)] == close(bleu)
    for order, column in enumerate(zip(*bleu_each(statistics), strict=True)):
        assert list(column) == close(bleu_rows[order])

    cider, cider_each = Cider().compute_score(truth, results)
    assert scores["cider_d"] == close(cider)
    assert statistics.cider_d.tolist() == close(list(cider_each))
    # An infinite sigma takes the length penalty out of the reference implementation as well.
    no_penalty, no_penalty_each = Cider(sigma=1e9).compute_score(truth, results)
    assert scores["cider"] == close(no_penalty)
    assert statistics.cider.tolist() == close(list(no_penalty_each))

    rouge, rouge_each = Rouge().compute_score(truth, results)
    assert scores["rouge_l"] == close(rouge)
    assert statistics.rouge_l.tolist() == close(list(rouge_each))


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corpora())
def test_bleu_cider_rouge_equal_pycocoevalcap(corpus: Corpus) -> None:
    corpus = with_duplicates(corpus)
    assume(
        any(tokens for refs in corpus[1] for tokens in refs)
    )  # pycocoevalcap stops on references without a single token
    check_against_coco(corpus)


@pytest.mark.parametrize("tokenizer", ["mecab_ko", "kiwi", "char", "whitespace", "ptb"])
def test_parity_holds_on_real_tokens_of_long_captions(tokenizer: str) -> None:
    split = get_tokenizer(tokenizer)
    sentences = [
        "넓은 바닷가에 파도가 밀려오고 있습니다.",
        "카메라는 왼쪽에서 오른쪽으로 천천히 이동합니다.",
        '화면 위에는 "KBS 뉴스"라는 글자가 3.5초 동안 보입니다.',
        "해가 지면서 하늘이 붉은색으로 물듭니다.",
        "사람들이 모래사장을 따라 걷고, 개 한 마리가 뛰어다닙니다.",
        "A dog isn't running on the beach (today).",
    ]
    generator = random.Random(7)
    hypotheses, references = [], []
    for _ in range(8):
        shuffled = generator.sample(sentences, 5)
        hypotheses.append(split(" ".join(shuffled[: generator.randint(1, 5)])))
        references.append([split(" ".join(generator.sample(shuffled, 4))) for _ in range(generator.randint(1, 5))])
    check_against_coco((hypotheses, references))


def test_chrf_equals_sacrebleu_with_unequal_numbers_of_references() -> None:
    predictions = ["바다에 파도가 친다", "", "a dog runs"]
    references = [["바다에 파도가 밀려온다", "파도가 치는 바다"], ["산"], ["the dog ran", "a dog runs", "a cat"]]
    streams = [
        ["바다에 파도가 밀려온다", "산", "the dog ran"],
        ["파도가 치는 바다", None, "a dog runs"],
        [None, None, "a cat"],
    ]
    expected = CHRF(word_order=2).corpus_score(predictions, streams).score  # type: ignore[arg-type]
    assert expected > 1
    assert corpus_chrf(predictions, references) == pytest.approx(expected, abs=1e-9)
    one_each = corpus_chrf(predictions, [refs[:1] for refs in references])
    assert one_each != pytest.approx(expected)


@pytest.mark.parametrize(
    "score", [reference.corpus_bleu, reference.corpus_rouge_l, corpus_meteor, reference.corpus_cider]
)
def test_corpora_of_unequal_length_are_refused(score: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        score([["바다"], ["산"], ["강"]], [[["바다"]], [["산"]]])


# Printed by meteor-1.5.jar with `-l en -m exact`. In the last pair words repeat so much that the order of ties decides
# its chunks.
METEOR_JAR: list[tuple[str, list[str], float]] = [
    ("바다 에서 사람 이 달린다 .", ["바다 에서 사람 이 달린다 ."], 1.0),
    ("바다 에서 사람 이 달린다 .", ["바다 에서 사람 이 걷 는다 .", "산 에서 개 가 달린다 ."], 0.3507323440574334),
    ("사람 이 바다 에서 달린다", ["바다 에서 사람 이 달린다"], 0.45827172913153946),
    ("개", ["고양이", "개 가 짖 는다"], 0.11267605633802819),
    ("산 이 보인다", ["하늘 은 맑 다"], 0.0),
    ('" KBS " 라는 글자 가 , 화면 에 보인다 !', ['화면 에 " KBS " 글자 가 보인다 .'], 0.43622800184687255),
    ("사람 이 개 가 사람 이 새 가 사람 이 난다", ["새 가 사람 이 개 가 난다 사람 이"], 0.47402922556421007),
    (
        "가 을 구름 가 길 에서 구름 을 에서 가 바다 하늘 구름 바다 바다 바다 산 하늘 산 구름 는 에서 하늘 바다 산 이 "
        "길 구름 는 을",
        [
            "산 산 이 에서 구름 하늘 산 에서 하늘 바다 길 는 구름 을 에서 을 가 길 에서 구름 길 을 에서 가 가 바다 "
            "하늘 구름 가 바다"
        ],
        0.3947854716547752,
    ),
]
METEOR_JAR_CORPUS = 0.3883676760474592


def test_meteor_equals_the_jar() -> None:
    hypotheses = [hypothesis.split() for hypothesis, _, _ in METEOR_JAR]
    references = [[reference.split() for reference in refs] for _, refs, _ in METEOR_JAR]
    assert sentence_meteor(hypotheses, references) == pytest.approx([score for _, _, score in METEOR_JAR], abs=1e-9)
    assert corpus_meteor(hypotheses, references) == pytest.approx(METEOR_JAR_CORPUS, abs=1e-9)
