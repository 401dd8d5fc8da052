"""The normal form of captions inside the program."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Invisible characters that no tokenizer expects: control characters, soft hyphens, zero-width and direction marks, byte
# order marks, and half surrogates, which no file can hold. Joiners and variation selectors stay, as emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]"
)

_HANGUL = re.compile("[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]")  # syllables and jamo

# Letters and symbols by their category, although nothing is drawn for them.
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def normalize_caption(text: str) -> str:
    """Returns `text` in Unicode NFC, without invisible characters and with single blanks for runs of white space.

    Decomposed Hangul (as macOS writes it) looks the same but matches nothing, and a stray line separator shifts all
    later lines of files that are read by line; line separators count as white space. Text with nothing visible, such as
    joiners or Hangul fillers alone, becomes "". The function is idempotent.
    """
    # Invisible characters are removed first: a mark between two jamo would keep them from composing.
    caption = " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())
    return caption if any(map(_is_visible, caption)) else ""


def is_mainly_hangul(texts: Iterable[str]) -> bool:
    """Returns whether more than half of all letters in the texts are Hangul; False if there are no letters."""
    letters = hangul = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        hangul += len(_HANGUL.findall(text))
    return 2 * hangul > letters


def _is_visible(char: str) -> bool:
    """Returns whether a character is visible by itself: no control, format, blank, combining or filler character."""
    return (
        char not in _FILLERS
        and (category := unicodedata.category(char))[0] not in "ZM"
        and category not in ("Cc", "Cf", "Cs")
    )
