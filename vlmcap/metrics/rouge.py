"""ROUGE-L over tokens (Lin, "ROUGE: a package for automatic evaluation of summaries", 2004), as COCO's caption evaluation computes it.

    P = LCS / tokens of the hypothesis,  R = LCS / tokens of the reference,  F = (1 + b^2) P R / (R + b^2 P),  b = 1.2

LCS is the length of the longest common subsequence. With several references the largest P and the largest R are taken, even from two
different ones. Two empty captions count as equal. Tokens are compared as they are: packages that keep only ASCII words score identical
Korean captions 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmcap.metrics.ngrams import Tokens

_BETA = 1.2


def lcs_length(first: Tokens, second: Tokens) -> int:
    """The length of the longest common subsequence of two token sequences, in O(len(first) * len(second))."""
    if len(first) < len(second):
        first, second = second, first
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if token == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def rouge_l(hypothesis: Tokens, references: Sequence[Tokens], *, beta: float = _BETA) -> float:
    """ROUGE-L of one caption, between 0 and 1.

    Args:
        hypothesis: The tokens of the prediction.
        references: The tokens of one or more references.
        beta: How much more recall weighs than precision.

    Returns:
        The F score of the best precision and the best recall.
    """
    # An empty caption is one empty token in the reference implementation; this also keeps both divisions defined.
    hypothesis = hypothesis or [""]
    precision = recall = 0.0
    for reference in (reference or [""] for reference in references):
        common = lcs_length(hypothesis, reference)
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / len(reference))
    if precision == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def sentence_rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, beta: float = _BETA) -> list[float]:
    """ROUGE-L of each clip, between 0 and 1."""
    return [rouge_l(hypothesis, refs, beta=beta) for hypothesis, refs in zip(hypotheses, references, strict=True)]


def corpus_rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, beta: float = _BETA) -> float:
    """The mean ROUGE-L over clips, between 0 and 1."""
    return sum(sentence_rouge_l(hypotheses, references, beta=beta)) / len(hypotheses)
