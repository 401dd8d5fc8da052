"""Penn Treebank tokens as COCO caption scores use them, without Java.

The rules are those of Stanford's PTBTokenizer 3.4.1 with `-preserveLines -lowerCase` so far as captions need them, followed by the
removal of punctuation that COCO's evaluation does. Hangul words come out as whitespace would split them, particles and all.
"""

from __future__ import annotations

import re

# COCO's evaluation removes these tokens after lower-casing. It means to remove brackets too, but lists them in capitals, so
# "-lrb-" and its kin stay in published scores; they stay here as well.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "½": "1/2", "¼": "1/4", "¾": "3/4"}
_RENAMED |= {"£": "#", "€": "$", "₩": "", "「": "", "」": "", "《": "", "》": ""}  # an empty name: the tokeniser knows no such token
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "--", "—": "--", "―": "--"})

_TWO_WORDS = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"), "gimme": ("gim", "me")}
_TITLES = "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|co|inc|ltd|no|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|a\\.m|p\\.m"

_TOKEN = re.compile(
    rf"""
      https?://\S+ | [\w.+-]+@[\w-]+\.[\w.-]+ | </?[a-z][^<>]*>     # addresses and tags stay whole
    | [\#@][^\W\d]\w*
    | \.\.\.+ | --+ | [?!]+                                         # runs are one token
    | (?:[a-z]\.){{2,}} | \b(?:{_TITLES})\.(?!\w)                   # u.s., e.g., mr.
    | n't\b | '(?:s|m|d|ll|re|ve)\b
    | \d+(?:[.,:/]\d+)+(?:(?=\D)|$)                                 # 3.5 | km, 1,000 | 원: but 3명 is one word
    | [^\W_]+?(?=n't\b)
    | o'clock\b | [^\W_](?:\w|[-.&/](?=\w))*                         # state-of-the-art; a full stop inside a word does not end it
    | \S
    """,
    re.VERBOSE,
)


def split_ptb(text: str) -> list[str]:
    """The lower-case Penn Treebank tokens of normalised text, without the punctuation that COCO's evaluation removes.

    English contractions are split ("isn't" gives "is", "n't"), brackets become "-lrb-" and the like, a number with a separator parts from
    its unit ("3.5km" gives "3.5", "km"). Rare rules (fractions, abbreviations before a capital) are left out.

    Args:
        text: Text on one line.

    Returns:
        The tokens.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(text.translate(_QUOTES).lower()):
        if token in _DROPPED or token == '"' or token.startswith("..."):
            continue
        if token.strip("-") == "":
            continue
        tokens.extend(part for part in _TWO_WORDS.get(token, (_RENAMED.get(token, token),)) if part)
    return tokens
