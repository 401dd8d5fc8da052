"""A corpus score by its name as a `ClipMetric`, from texts: what comparing runs needs of their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.metrics.clip_metrics import ClipMetric, clip_metrics, content_metric, fact_metric, meteor_metric
from vlmcap.metrics.content import Synonyms, content_counts
from vlmcap.metrics.corpus import clip_statistics
from vlmcap.metrics.facts import FactLexicon, fact_counts
from vlmcap.metrics.meteor import meteor_statistics
from vlmcap.metrics.meteor_ko import meteor_ko_statistics
from vlmcap.metrics.scores import count_references, tokenize_captions
from vlmcap.metrics.tokenizers import Tokenizer

COUNTED = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "cider_d", "rouge_l")
"""The names that come together from one pass over the captions."""


def is_clip_score(name: str) -> bool:
    """Whether `clip_scores` knows the name: the others are of the corpus as a whole, or of pretrained models."""
    return name in COUNTED or name in ("meteor", "meteor_ko") or name.startswith(("content_", "content/", "facts/"))


def clip_scores(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: Tokenizer,
    synonyms: Synonyms | str | Path | None = None,
    lexicon: FactLexicon | None = None,
) -> dict[str, ClipMetric]:
    """The named score, and those that come with it for nothing.

    Args:
        name: As in `score_captions`, `content/noun_recall`, `facts/mean` or `facts/<fact>`.
        predictions: One text a clip.
        references: For each clip one or more texts.
        tokenizer: Of BLEU, CIDEr, ROUGE-L and METEOR.
        synonyms: Of content words.
        lexicon: Of facts, which are known by it alone.

    Raises:
        UserError: The name is that of no such score, or as in `score_captions`.
    """
    if name in COUNTED:
        corpus = count_references(references, tokenizer)
        return clip_metrics(clip_statistics(tokenize_captions(predictions, tokenizer), corpus))
    if name == "meteor":
        tokens, known = tokenize_captions(predictions, tokenizer), count_references(references, tokenizer).tokens()
        return {name: meteor_metric([meteor_statistics(said, refs) for said, refs in zip(tokens, known, strict=True)])}
    if name == "meteor_ko":
        return {name: meteor_metric(meteor_ko_statistics(predictions, references), name)}
    if name.startswith(("content_", "content/")):
        return {name: content_metric(content_counts(predictions, references, synonyms), name)}
    if name.startswith("facts/") and lexicon is not None:
        return _facts(name, predictions, references, lexicon)
    raise UserError(f"{name} is no score of clips; there are {', '.join(COUNTED)}, meteor, meteor_ko, content_f1 and facts/mean")


def _facts(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], lexicon: FactLexicon) -> dict[str, ClipMetric]:
    counts = fact_counts(predictions, references, lexicon)
    metrics = {f"facts/{fact}": fact_metric(counts[:, [index]], f"facts/{fact}") for index, fact in enumerate(lexicon.phrases)}
    metrics["facts/mean"] = fact_metric(counts)
    if name not in metrics:
        raise UserError(f"there is no fact {name.removeprefix('facts/')}: choose one of {', '.join(lexicon.phrases)}, mean")
    return metrics
