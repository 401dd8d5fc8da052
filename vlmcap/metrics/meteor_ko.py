"""METEOR over Korean stems: what `meteor` is to English with its stem stage, with mecab-ko in the stemmer's place.

The text is taken apart into morphemes, so an inflected verb or adjective matches at its stem whatever its ending (달립니다, 달렸다, 달리는:
달리). Particles, endings, auxiliary verbs, affixes and punctuation are the function words: each weighs 1 - delta = 0.25 against 0.75, and
matches if it is the same one, forms that only the sound before them chooses counted as one (이/가, 을/를, 았/었, ㅂ니다/습니다). A content
word matches a content word, never a function word that looks like it. Alignment and parameters are those of `vlmcap.metrics.meteor`,
which METEOR 1.5 tuned on English: no Korean judgements have tuned these. Compare runs by it, not with METEOR of published work.

Synonyms are not matched here; `content_scores` takes a file of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmcap.metrics.meteor import CONTENT_WEIGHT, FUNCTION_WEIGHT, MeteorStatistics, meteor_from_statistics, meteor_statistics
from vlmcap.metrics.morphemes import Morpheme, analyze_many

# Begins the token of a function word; normalised text holds no tab.
_FUNCTION = "\t"
_SAME = (
    "이 가|은 는|을 를|와 과|로 으로|로서 으로서|로써 으로써|아 야|이나 나|이랑 랑|이라는 라는|이라고 라고",  # particles
    "았 었 였|아 어 여|아서 어서 여서|아요 어요 여요|아도 어도 여도|아야 어야 여야|며 으며|면 으면|면서 으면서|"
    "ᄂ 은 ᆫ|ᄅ 을 ᆯ|ᄇ니다 습니다 ᆸ니다|ᄂ다 는다 ᆫ다",  # endings; the dictionary writes their final consonants in either way
)
_PARTICLES, _ENDINGS = ({form: forms.split()[0] for forms in table.split("|") for form in forms.split()} for table in _SAME)


def corpus_meteor_ko(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR of the corpus over Korean stems, between 0 and 1, from the summed counts of `meteor_ko_statistics`.

    Args:
        predictions: One text a clip; normalised here.
        references: For each clip one or more texts.

    Returns:
        The score.

    Raises:
        UserError: mecab-ko is not installed.
    """
    return meteor_from_statistics(sum(meteor_ko_statistics(predictions, references), MeteorStatistics()))


def meteor_ko_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[MeteorStatistics]:
    """The counts of each clip over Korean stems, for scores of clips and for `vlmcap.metrics.significance`.

    Raises:
        UserError: mecab-ko is not installed.
    """
    hypotheses = analyze_many(predictions)
    flat = iter(analyze_many([reference for refs in references for reference in refs]))
    counted = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        stems = [_tokens(next(flat)) for _ in refs]
        counted.append(meteor_statistics(_tokens(hypothesis), stems, _weigh))
    return counted


def _tokens(morphemes: list[Morpheme]) -> list[str]:
    return [_function_token(m) if m.is_function else m.form for m in morphemes]


def _function_token(morpheme: Morpheme) -> str:
    # Only words of one kind are forms of each other: 은 is a particle, and an ending as well.
    kind = morpheme.tag[0]
    same = {"J": _PARTICLES, "E": _ENDINGS}.get(kind, {})
    return f"{_FUNCTION}{kind}{same.get(morpheme.form, morpheme.form)}"


def _weigh(token: str) -> float:
    return FUNCTION_WEIGHT if token.startswith(_FUNCTION) else CONTENT_WEIGHT
