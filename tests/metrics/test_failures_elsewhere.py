"""Errors of other tools with Korean captions, shown on the tools if they are installed, which do not occur here."""

from __future__ import annotations

import shutil
import unicodedata

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from vlmcap.metrics import get_tokenizer, score_captions
from vlmcap.metrics.content import content_scores

needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="shows what Stanford's tokenizer does, which needs Java"
)

PLACES = ["바다", "산", "숲", "강", "도시", "마을", "공원", "시장"]
CAPTIONS = [f"{place} 위로 붉은 해가 {index} 번 천천히 떠오른다" for index, place in enumerate(PLACES)]
REFERENCES = [[caption] for caption in CAPTIONS]


@needs_java
@pytest.mark.parametrize("separator", ["\r", "\u2028", "\v", "\f"])
def test_a_line_separator_shifts_every_later_pair_of_pycocoevalcap_and_none_here(separator: str) -> None:
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    broken = [CAPTIONS[0].replace(" ", separator, 1), *CAPTIONS[1:]]
    results = {index: [{"caption": caption}] for index, caption in enumerate(broken)}
    truth = {index: [{"caption": caption}] for index, caption in enumerate(CAPTIONS)}
    tokenizer = ptbtokenizer.PTBTokenizer()
    theirs, _ = Bleu(4).compute_score(tokenizer.tokenize(truth), tokenizer.tokenize(results), verbose=0)
    assert theirs[3] < 0.95
    assert score_captions(broken, REFERENCES, tokenizer="ptb", metrics=["bleu_4"])["bleu_4"] == pytest.approx(1)


def test_identical_korean_strings_score_nothing_with_an_ascii_rouge_and_everything_here() -> None:
    rouge = pytest.importorskip("torchmetrics.functional.text.rouge")
    theirs = rouge.rouge_score([CAPTIONS[0].replace("0", "영")], [CAPTIONS[0].replace("0", "영")], rouge_keys="rougeL")
    assert float(theirs["rougeL_fmeasure"]) == 0
    for tokenizer in ("mecab_ko", "char", "whitespace", "ptb"):
        assert score_captions(CAPTIONS, REFERENCES, tokenizer=tokenizer, metrics=["rouge_l"])[
            "rouge_l"
        ] == pytest.approx(1)


def test_decomposed_hangul_matches_nothing_unless_it_is_composed() -> None:
    decomposed = [unicodedata.normalize("NFD", caption) for caption in CAPTIONS]
    bleu, _ = Bleu(1).compute_score(
        dict(enumerate(REFERENCES)), {i: [caption] for i, caption in enumerate(decomposed)}, verbose=0
    )
    assert bleu[0] < 0.2  # the digits
    assert score_captions(decomposed, REFERENCES, metrics=["bleu_4"])["bleu_4"] == pytest.approx(1)
    assert content_scores(decomposed, REFERENCES)["content_f1"] == 1


def test_brackets_leak_as_names_only_where_published_scores_have_them() -> None:
    text = "뉴스(KBS) [속보] {끝}"
    assert {"-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"} <= set(get_tokenizer("ptb")(text))
    for name in ("mecab_ko", "char", "whitespace"):
        assert not any(token.startswith("-l") or token.startswith("-r") for token in get_tokenizer(name)(text))


def test_cider_of_batches_is_not_that_of_the_corpus() -> None:
    # Fog is in some clips of the corpus, and in one, both or none of a batch.
    references = [[f"{caption} 안개 속에서" if index % 3 == 0 else caption] for index, caption in enumerate(CAPTIONS)]
    predictions = [f"{caption} 안개 속에서" if index % 2 == 0 else caption for index, caption in enumerate(CAPTIONS)]

    def cider_d(start: int, end: int) -> float:
        return score_captions(
            predictions[start:end], references[start:end], tokenizer="whitespace", metrics=["cider_d"]
        )["cider_d"]

    whole = cider_d(0, 8)
    theirs, _ = Cider().compute_score(
        dict(enumerate(references)), {index: [caption] for index, caption in enumerate(predictions)}
    )
    assert whole == pytest.approx(theirs, rel=1e-9)
    assert abs(sum(cider_d(start, start + 2) for start in range(0, 8, 2)) / 4 / whole - 1) > 0.01
