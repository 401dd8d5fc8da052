"""chrF++ over characters and words (Popovic, "chrF++: words helping character n-grams", WMT 2017), by sacrebleu.

It needs no tokeniser, so it is the one overlap score that two groups can compare without agreeing on a morpheme analyser.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmcap.metrics.tokenizers import normalize


def corpus_chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF++ of the corpus, from 0 to 100 as sacrebleu and the literature print it.

    Character n-grams up to 6 without spaces, word n-grams up to 2, beta = 2. Of several references the best one counts.

    Args:
        predictions: One text a clip; normalised here.
        references: For each clip one or more texts; clips may have different numbers of them.

    Returns:
        The score.
    """
    from sacrebleu.metrics.chrf import CHRF

    # sacrebleu takes the n-th reference of all clips as one stream and ignores None where a clip has fewer.
    most = max(len(refs) for refs in references)
    streams = [[normalize(refs[index]) if index < len(refs) else None for refs in references] for index in range(most)]
    score: float = CHRF(word_order=2).corpus_score([normalize(text) for text in predictions], streams).score  # type: ignore[arg-type]
    return score
