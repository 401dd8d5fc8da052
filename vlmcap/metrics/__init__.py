"""Reproducible caption scores for Korean: no Java, no network, and the tokenizer named with every number.

    from vlmcap.metrics import score_captions

    references = [["파도가 밀려오는 바다.", "바다에 파도가 친다."]]
    scores = score_captions(["파도가 치는 바다."], references, metrics=["bleu_4", "rouge_l"])

Importing this package loads no morpheme analyzer; each is loaded by the first score that needs it.
"""

from vlmcap.metrics.facts import FactLexicon, fact_accuracy, permutation_expectation, swapped_fact_accuracy
from vlmcap.metrics.scores import (
    METRIC_LABELS,
    METRIC_NAMES,
    STANDARD_METRICS,
    score_by_category,
    score_captions,
    score_each,
)
from vlmcap.metrics.tokenizers import TOKENIZER_NAMES, Tokenizer, get_tokenizer, normalize

__all__ = [
    "METRIC_LABELS",
    "METRIC_NAMES",
    "STANDARD_METRICS",
    "TOKENIZER_NAMES",
    "FactLexicon",
    "Tokenizer",
    "fact_accuracy",
    "get_tokenizer",
    "normalize",
    "permutation_expectation",
    "score_by_category",
    "score_captions",
    "score_each",
    "swapped_fact_accuracy",
]
