"""The one form in which captions enter the program."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# What nobody sees and no tokenizer expects: control characters, soft hyphens, marks of width zero and of direction,
# byte order marks, and half surrogates, which no file can hold. The joiners and variants that emoji are made of stay.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]"
)

_HANGUL = re.compile("[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]")  # syllables and jamo

_FILLERS = frozenset(
    "\u115f\u1160\u2800\u3164\uffa0"
)  # letters and symbols by their category, of which nothing is drawn


def normalize_caption(text: str) -> str:
    """`text` in Unicode NFC without invisible characters, and with every run of white space, line separators included, as one blank.

    Decomposed Hangul (as macOS writes it) looks the same and matches nothing; a stray line separator shifts all later
    lines of files that are read by line. Text of which nothing can be seen, such as joiners or Hangul fillers alone, is
    "". Doing it again changes nothing.
    """
    # Removing comes first: a mark between two jamo would keep them from composing.
    caption = " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())
    return caption if any(map(_is_visible, caption)) else ""


def is_mainly_hangul(texts: Iterable[str]) -> bool:
    """Whether more than half of the letters of all texts together are Hangul; false where there are none."""
    letters = hangul = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        hangul += len(_HANGUL.findall(text))
    return 2 * hangul > letters


def _is_visible(char: str) -> bool:
    """Whether a character shows something by itself: no control, format, blank or combining character and no filler."""
    return (
        char not in _FILLERS
        and (category := unicodedata.category(char))[0] not in "ZM"
        and category not in ("Cc", "Cf", "Cs")
    )
