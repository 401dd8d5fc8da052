"""The one form in which captions enter the program."""

from __future__ import annotations

import unicodedata


def normalize_caption(text: str) -> str:
    """`text` in Unicode NFC with every run of white space, line separators included, as one blank.

    Decomposed Hangul (as macOS writes it) looks the same and matches nothing; a stray line separator shifts all later lines of files
    that are read by line.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())
