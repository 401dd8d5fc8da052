"""All caption scores in one call: from texts to named numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlmcap.errors import UserError
from vlmcap.metrics.captions import check_captions
from vlmcap.metrics.content import Synonyms, content_scores
from vlmcap.metrics.corpus import ReferenceCorpus, by_category, clip_statistics, corpus_scores
from vlmcap.metrics.diversity import distinct_ratio, repetition_rate, self_bleu
from vlmcap.metrics.meteor import corpus_meteor, corpus_meteor_ko
from vlmcap.metrics.ngram_scores import bleu_from_counts, warn_of_one_clip
from vlmcap.metrics.tokenizers import DEFAULT_TOKENIZER, Tokenizer, get_tokenizer, normalize

METRIC_LABELS: dict[str, str] = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "cider": "CIDEr (no length penalty)",
    "cider_d": "CIDEr-D",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR (exact match)",
    "meteor_ko": "METEOR over Korean stems",
    "content_precision": "Content words, precision",
    "content_recall": "Content words, recall",
    "content_f1": "Content words, F1",
    "chrf": "chrF++ (0–100)",
    "distinct_ratio": "Distinct captions",
    "length_ratio": "Length ratio",
    "self_bleu": "Self-BLEU (sample)",
    "repetition_rate": "Repeated 4-grams",
}
METRIC_NAMES: tuple[str, ...] = tuple(METRIC_LABELS)
# BLEU-1 to METEOR, and three cheap ones; the others are computed if they are named.
STANDARD_METRICS: tuple[str, ...] = (*METRIC_NAMES[:8], "chrf", "distinct_ratio", "length_ratio")

_CIDER = ("cider", "cider_d")
# What `tokenizers` gives to the most worker processes that it starts.
_BATCH_CHARACTERS = 8_000_000


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str | Tokenizer = DEFAULT_TOKENIZER,
    metrics: Sequence[str] | None = None,
    synonyms: Synonyms | str | Path | None = None,
) -> dict[str, float]:
    """Computes the scores of a corpus of captions.

    Pass the whole corpus at once: averages of CIDEr, BLEU and METEOR over batches differ from the corpus scores. The
    references of the last two corpora stay counted in memory, about 90 bytes per token, so that other predictions of
    the same clips are scored without tokenizing them again.

    Args:
        predictions: One caption per clip; an empty one counts as wrong, not as missing.
        references: One or more captions per clip; clips may have different numbers of them.
        tokenizer: A name in `TOKENIZER_NAMES`, or a `Tokenizer`. Scores of different tokenizers cannot be compared.
        metrics: Names in `METRIC_LABELS` to compute; those in `STANDARD_METRICS` if None.
        synonyms: Words that count as the same content word, see `vlmcap.metrics.content.load_synonyms`.

    Returns:
        Name to score, in the requested order. BLEU, ROUGE-L and METEOR are between 0 and 1, CIDEr and CIDEr-D between 0
        and 10 (NaN with a warning for a single clip), chrF++ between 0 and 100; the length ratio is ideally 1.

    Raises:
        UserError: There is no caption, the numbers differ, a text is None, a clip has no reference, or a name is
            unknown.

    Example:
        >>> predictions = ["파도가 치는 바다.", "눈 덮인 산이 보인다."]
        >>> references = [["파도가 밀려오는 바다.", "바다에 파도가 친다."], ["눈 덮인 산이 보인다."]]
        >>> scores = score_captions(predictions, references, metrics=["bleu_4", "cider", "rouge_l"])
        >>> {name: round(score, 3) for name, score in scores.items()}
        {'bleu_4': 0.732, 'cider': 6.686, 'rouge_l': 0.929}
    """
    check_captions(predictions, references)
    wanted = _check_metrics(metrics)
    # 1. Scores of texts, which need no tokenizer or their own.
    scores: dict[str, float] = {}
    if "chrf" in wanted:
        scores["chrf"] = corpus_chrf(predictions, references)
    if "distinct_ratio" in wanted:
        scores["distinct_ratio"] = distinct_ratio(predictions)
    if "meteor_ko" in wanted:
        scores["meteor_ko"] = corpus_meteor_ko(predictions, references)
    if any(name.startswith("content_") for name in wanted):
        scores |= content_scores(predictions, references, synonyms)
    # 2. Scores of tokens, which are counted one time for all of them.
    token_metrics = {name for name in wanted if name not in scores}
    split = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if token_metrics:
        scores |= _token_scores(predictions, references, split, token_metrics)
    return {name: scores[name] for name in wanted}


def score_each(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: str | Tokenizer = DEFAULT_TOKENIZER
) -> list[dict[str, float]]:
    """Computes the scores of each caption, `cider`, `cider_d`, `rouge_l` and `bleu_4`, for a file of predictions.

    CIDEr takes document frequencies from all given references, so its mean, and that of ROUGE-L, is the score of the
    corpus; the mean of BLEU is not.

    Args:
        predictions: One caption per clip.
        references: One or more captions per clip.
        tokenizer: A name in `TOKENIZER_NAMES`, or a `Tokenizer`.

    Returns:
        One dictionary per clip, in the same order.

    Raises:
        UserError: As in `score_captions`.
    """
    check_captions(predictions, references)
    split = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    corpus = count_references(references, split)
    statistics = clip_statistics(tokenize_captions(predictions, split), corpus)
    if len(corpus) == 1:
        warn_of_one_clip()
    bleu = bleu_from_counts(
        statistics.matches, statistics.ngrams, statistics.hypothesis_length, statistics.reference_length
    )
    columns = {
        "cider": statistics.cider,
        "cider_d": statistics.cider_d,
        "rouge_l": statistics.rouge_l,
        "bleu_4": bleu[:, 3],
    }
    by_clip = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in by_clip]


def score_by_category(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    categories: Sequence[Hashable],
    *,
    tokenizer: str | Tokenizer = DEFAULT_TOKENIZER,
) -> dict[Hashable, dict[str, float]]:
    """Computes BLEU, CIDEr, CIDEr-D and ROUGE-L per category, and its number of clips as `clips`; see `by_category`.

    Raises:
        UserError: As in `score_captions`, or the numbers of categories and clips differ.
    """
    check_captions(predictions, references)
    split = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return by_category(
        clip_statistics(tokenize_captions(predictions, split), count_references(references, split)), categories
    )


def corpus_chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Computes chrF++ of the corpus, from 0 to 100 as printed by sacrebleu and in papers (Popovic, "chrF++", WMT 2017).

    It needs no tokenizer, so it is the one overlap score that is comparable without agreeing on a morpheme analyzer. It
    uses character n-grams up to 6 without spaces, word n-grams up to 2, and beta = 2. Of several references the best
    one counts.

    Args:
        predictions: One text per clip, which is normalized here.
        references: One or more texts per clip; clips may have different numbers of them.
    """
    from sacrebleu.metrics.chrf import CHRF

    # sacrebleu takes the n-th reference of all clips as one stream, with None where a clip has fewer.
    most = max(len(refs) for refs in references)
    streams = [[normalize(refs[index]) if index < len(refs) else None for refs in references] for index in range(most)]
    score: float = CHRF(word_order=2).corpus_score([normalize(text) for text in predictions], streams).score  # type: ignore[arg-type]
    return score


def _check_metrics(metrics: Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None:
        return STANDARD_METRICS
    if isinstance(metrics, str):
        raise UserError(f"metrics must be a list of names, not the text {metrics!r}; write [{metrics!r}].")
    for name in metrics:
        if name not in METRIC_LABELS:
            raise UserError(f"Unknown metric {name!r}; choose among {', '.join(METRIC_NAMES)}.")
    return tuple(metrics)


def tokenize_captions(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[str]]:
    """Tokenizes each text; equal tokens are one object, so a morpheme takes 8 bytes per occurrence instead of 80."""
    known: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    for batch in _batches(list(dict.fromkeys(texts))):
        # None lets the tokenizer choose the number of processes.
        try:
            split = tokenizer.tokenize_many(batch)
        except (RuntimeError, OSError):  # no second process can start here, because of a sandbox or too little memory
            split = tokenizer.tokenize_many(batch, workers=1)
        for text, tokens in zip(batch, split, strict=True):
            captions[text] = [known.setdefault(token, token) for token in tokens]
    return [captions[text] for text in texts]


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """Yields batches large enough to keep many processes busy, small enough to hold their unshared tokens."""
    start = size = 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= _BATCH_CHARACTERS or end == len(texts):
            yield texts[start:end]
            start, size = end, 0


class _Counted(NamedTuple):
    """Counted references, with the tokenizer and the texts that they come from."""

    tokenizer: Tokenizer
    texts: tuple[tuple[str, ...], ...]
    corpus: ReferenceCorpus


# The references of a validation and a test split are the same in every epoch, and tokenizing them takes longer than
# computing all scores.
_COUNTED: deque[_Counted] = deque(maxlen=2)


def count_references(references: Sequence[Sequence[str]], tokenizer: Tokenizer) -> ReferenceCorpus:
    """Tokenizes and counts the references of each clip, or returns the cached result for the same texts."""
    # The texts themselves are compared: that costs nothing for strings that are the same object, and never misses a
    # change.
    texts = tuple(map(tuple, references))
    for counted in tuple(_COUNTED):
        if counted.tokenizer == tokenizer and counted.texts == texts:
            return counted.corpus
    flat = iter(tokenize_captions([text for refs in texts for text in refs], tokenizer))
    corpus = ReferenceCorpus([[next(flat) for _ in refs] for refs in texts])
    _COUNTED.append(_Counted(tokenizer, texts, corpus))
    return corpus


def _token_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: Tokenizer, wanted: set[str]
) -> dict[str, float]:
    """Computes the wanted scores, together with those that come at no extra cost."""
    corpus = count_references(references, tokenizer)
    hypotheses = tokenize_captions(predictions, tokenizer)
    scores: dict[str, float] = {}
    if "meteor" in wanted:
        scores["meteor"] = corpus_meteor(hypotheses, corpus.tokens())
    if "self_bleu" in wanted:
        scores["self_bleu"] = self_bleu(hypotheses)
    if "repetition_rate" in wanted:
        scores["repetition_rate"] = repetition_rate(hypotheses)
    # BLEU, CIDEr, ROUGE-L and the length ratio come from the same statistics.
    if wanted - scores.keys():
        statistics = clip_statistics(hypotheses, corpus)
        scores |= corpus_scores(statistics)
        closest = int(statistics.reference_length.sum())
        scores["length_ratio"] = int(statistics.hypothesis_length.sum()) / closest if closest else math.nan
    if len(corpus) == 1 and wanted.intersection(_CIDER):
        warn_of_one_clip()
    return scores
