"""All caption scores in one call: texts in, named numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlmcap.errors import UserError
from vlmcap.metrics.bleu import corpus_bleu, sentence_bleu
from vlmcap.metrics.checks import check_captions
from vlmcap.metrics.chrf import corpus_chrf
from vlmcap.metrics.cider import corpus_cider, sentence_cider
from vlmcap.metrics.diversity import distinct_ratio, length_ratio
from vlmcap.metrics.meteor import corpus_meteor
from vlmcap.metrics.ngrams import Tokens
from vlmcap.metrics.rouge import corpus_rouge_l, sentence_rouge_l
from vlmcap.metrics.tokenizers import Tokenizer, get_tokenizer

METRIC_LABELS: dict[str, str] = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "cider": "CIDEr (no length penalty)",
    "cider_d": "CIDEr-D",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR (exact match)",
    "chrf": "chrF++ (0–100)",
    "distinct_ratio": "Distinct captions",
    "length_ratio": "Length ratio",
}
METRIC_NAMES: tuple[str, ...] = tuple(METRIC_LABELS)

_BLEU = METRIC_NAMES[:4]
_CIDER = ("cider", "cider_d")


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str | Tokenizer = "mecab_ko",
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """The scores of a corpus of captions under their names.

    Give the whole corpus at once: CIDEr, BLEU and METEOR of batches, averaged, are other numbers.

    Args:
        predictions: One caption a clip; an empty one counts as wrong, not as missing.
        references: For each clip one or more captions; clips may have different numbers of them.
        tokenizer: A name of `TOKENIZER_NAMES`, or a `Tokenizer`. Scores of different tokenisers cannot be compared.
        metrics: The names of `METRIC_LABELS` to compute, all of them if None.

    Returns:
        Name to score, in the order asked for. BLEU, ROUGE-L and METEOR lie between 0 and 1, CIDEr and CIDEr-D between 0 and 10 (NaN with a
        warning for a single clip), chrF++ between 0 and 100; the length ratio is ideally 1.

    Raises:
        UserError: There is no caption, the numbers differ, a text is None, a clip has no reference, or a name is unknown.
    """
    check_captions(predictions, references)
    wanted = _check_metrics(metrics)
    scores: dict[str, float] = {}
    if "chrf" in wanted:
        scores["chrf"] = corpus_chrf(predictions, references)
    if "distinct_ratio" in wanted:
        scores["distinct_ratio"] = distinct_ratio(predictions)
    token_metrics = {name for name in wanted if name not in scores}
    split = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if token_metrics:
        scores |= _token_scores(*_tokenize(predictions, references, split), token_metrics)
    return {name: scores[name] for name in wanted}


def score_each(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: str | Tokenizer = "mecab_ko"
) -> list[dict[str, float]]:
    """The scores of each caption by itself, for a file of predictions: `cider`, `cider_d`, `rouge_l`, `bleu_4`.

    CIDEr takes document frequencies from all the references given, so its mean, and that of ROUGE-L, is the score of the corpus; the mean
    of BLEU is not.

    Args:
        predictions: One caption a clip.
        references: For each clip one or more captions.
        tokenizer: A name of `TOKENIZER_NAMES`, or a `Tokenizer`.

    Returns:
        One dictionary a clip, in the same order.

    Raises:
        UserError: As in `score_captions`.
    """
    check_captions(predictions, references)
    split = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    hypotheses, tokenized = _tokenize(predictions, references, split)
    rows = zip(
        sentence_cider(hypotheses, tokenized), sentence_rouge_l(hypotheses, tokenized), sentence_bleu(hypotheses, tokenized), strict=True
    )
    return [{"cider": cider.cider, "cider_d": cider.cider_d, "rouge_l": rouge_l, "bleu_4": bleu[3]} for cider, rouge_l, bleu in rows]


def _check_metrics(metrics: Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None:
        return METRIC_NAMES
    if isinstance(metrics, str):
        raise UserError(f"metrics must be a list of names, got the text {metrics!r}: write [{metrics!r}].")
    for name in metrics:
        if name not in METRIC_LABELS:
            raise UserError(f"Unknown metric {name!r}: choose among {', '.join(METRIC_NAMES)}.")
    return tuple(metrics)


def _tokenize(
    predictions: Sequence[str], references: Sequence[Sequence[str]], split: Callable[[str], list[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    # Collapsed models and templated references repeat captions; morpheme analysis of the same text is done once.
    texts = {*predictions, *(reference for refs in references for reference in refs)}
    tokens = {text: split(text) for text in texts}
    return [tokens[text] for text in predictions], [[tokens[reference] for reference in refs] for refs in references]


def _token_scores(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], wanted: set[str]) -> dict[str, float]:
    """The wanted scores, and those that come with them for nothing."""
    scores: dict[str, float] = {}
    if wanted.intersection(_BLEU):
        scores |= dict(zip(_BLEU, corpus_bleu(hypotheses, references), strict=True))
    if wanted.intersection(_CIDER):
        scores |= corpus_cider(hypotheses, references)._asdict()
    if "rouge_l" in wanted:
        scores["rouge_l"] = corpus_rouge_l(hypotheses, references)
    if "meteor" in wanted:
        scores["meteor"] = corpus_meteor(hypotheses, references)
    if "length_ratio" in wanted:
        scores["length_ratio"] = length_ratio(hypotheses, references)
    return scores
