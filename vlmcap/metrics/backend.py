"""Choice of the implementation: the native scores, or the scorers of the reference package.

`pycocoevalcap` is for numbers that COCO's package itself must have computed: its `Bleu`, `Cider` and `Rouge` run on our
tokens, under the same keys. They agree with the native scores to 1e-9 and take longer. Not used are its tokenizer,
which needs Java, shifts pairs at some line separators and adds nothing for Hangul; its METEOR, a Java program that
splits Hangul into syllables; and its SPICE, which downloads models and reads only English.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.metrics.captions import check_captions
from vlmcap.metrics.content import Synonyms
from vlmcap.metrics.ngrams import Tokens
from vlmcap.metrics.scores import STANDARD_METRICS, score_captions
from vlmcap.metrics.tokenizers import DEFAULT_TOKENIZER, Tokenizer, get_tokenizer

BACKENDS: tuple[str, ...] = ("native", "pycocoevalcap")
COCO_METRICS: tuple[str, ...] = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider_d", "rouge_l")
"""Scores that the reference package computes.

Its "CIDEr" is `cider_d`; `cider`, without the length penalty, is native with any backend.
"""


def check_backend(backend: str) -> None:
    """Raises `UserError` unless `backend` is in `BACKENDS`."""
    if backend not in BACKENDS:
        raise UserError(f"Unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")


def score_with(
    backend: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str | Tokenizer = DEFAULT_TOKENIZER,
    metrics: Sequence[str] | None = None,
    synonyms: Synonyms | str | Path | None = None,
) -> dict[str, float]:
    """Computes the scores of `score_captions`, with those in `COCO_METRICS` by the backend.

    Args:
        backend: A name in `BACKENDS`.
        predictions: One caption per clip.
        references: One or more captions per clip.
        tokenizer: As in `score_captions`.
        metrics: As in `score_captions`.
        synonyms: As in `score_captions`.

    Returns:
        Name to score, in the requested order. For a single clip CIDEr-D is 0 with pycocoevalcap, and NaN natively, as
        it is meaningless.

    Raises:
        UserError: As in `score_captions`, or the backend is unknown, not installed, or cannot score references without
            any token.
    """
    check_backend(backend)
    if backend == "native":
        return score_captions(predictions, references, tokenizer=tokenizer, metrics=metrics, synonyms=synonyms)
    check_captions(predictions, references)
    wanted = STANDARD_METRICS if metrics is None else tuple(metrics)
    native = [name for name in wanted if name not in COCO_METRICS]
    # Called even if no score is native, because it checks the names.
    # A lone text is passed on, too, since its characters would look like names; `score_captions` refuses it.
    names = metrics if isinstance(metrics, str) else native
    scores = score_captions(predictions, references, tokenizer=tokenizer, metrics=names, synonyms=synonyms)
    if len(native) < len(wanted):
        split = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        scores |= coco_scores(
            [split(text) for text in predictions], [[split(text) for text in refs] for refs in references], wanted
        )
    return {name: scores[name] for name in wanted}


def coco_scores(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], wanted: Sequence[str] = COCO_METRICS
) -> dict[str, float]:
    """Scores tokens with pycocoevalcap's `Bleu(4)`, `Cider()` and `Rouge()`.

    Args:
        hypotheses: Tokens of one prediction per clip.
        references: Tokens of one or more references per clip.
        wanted: Names in `COCO_METRICS`; others are ignored.

    Returns:
        Name to score, in the units of the package: BLEU and ROUGE-L between 0 and 1, CIDEr-D between 0 and 10.

    Raises:
        UserError: The package is not installed, or no reference has a token.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UserError('The backend "pycocoevalcap" needs its package: pip install pycocoevalcap.') from error
    # pycocoevalcap's CIDEr would take the maximum of no document frequencies.
    if not any(tokens for refs in references for tokens in refs):
        raise UserError("The references have no tokens, which pycocoevalcap cannot score; use the backend native.")
    # The package joins tokens by spaces and splits them again; our tokens contain none.
    truth = {index: [" ".join(tokens) for tokens in refs] for index, refs in enumerate(references)}
    results = {index: [" ".join(tokens)] for index, tokens in enumerate(hypotheses)}
    scores: dict[str, float] = {}
    if any(name.startswith("bleu") for name in wanted):
        # With the default `verbose=1` the package prints its counts to stdout.
        bleu, _ = Bleu(4).compute_score(truth, results, verbose=0)
        scores |= {f"bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)}
    if "cider_d" in wanted:
        scores["cider_d"] = float(Cider().compute_score(truth, results)[0])
    if "rouge_l" in wanted:
        scores["rouge_l"] = float(Rouge().compute_score(truth, results)[0])
    return scores
