"""Penn Treebank tokens as COCO caption scores use them, without Java.

The rules are those of Stanford's PTBTokenizer 3.4.1 with `-preserveLines -lowerCase` so far as captions need them, followed by the
removal of punctuation that COCO's evaluation does. Hangul words come out as whitespace would split them, particles and all. The tokens
equal the jar's on the hard strings of the tests, which run the jar where there is Java, and on every symbol of the blocks there.

Known deviations, all rare in captions: an operator between letters ("x+y" is one token in the jar, here three), "&" between small
letters ("a&b" is three tokens in the jar, here one), a space inside a fraction ("1 1/2"), "d'ye", escaped tags ("&lt;b&gt;"), smileys
(":)" leaks as ":-rrb-" from the jar; here it is "-rrb-"), and whatever of English abbreviations and file names is not tested.
"""

from __future__ import annotations

import re

# COCO's evaluation removes these tokens after lower-casing. It means to remove brackets too, but lists them in capitals, so
# "-lrb-" and its kin stay in published scores; they stay here as well.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RENAMED |= {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "£": "#", "€": "$", "¤": "$", "₠": "$", "¢": "cents"}
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "--", "—": "--", "―": "--"})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": ' " ', "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))

# What the jar does not know and drops with a warning: Korean quotation marks and units (《》『』㎞), emoji, the won sign.
_UNKNOWN = re.compile(
    "[«»\u2010-\u2012\u201b\u2024\u2025\u2027\u2039\u203a\u203c\u203d\u2043\u2045-\u205e\u2072\u2073\u208f\u209d-\u209f\u20a1-\u20a3\u20a5-\u20ab\u20ad-\u20ff"
    "\u2150-\u2152\u215f-\u2182\u2185-\u218f\u3003\u3004\u3007-\u3011\u3013-\u3030\u3036-\u303a\u303d-\u303f\u3200-\u33ff"
    "\uff00\uffe2-\uffe4\uffe7-\uffef\U00010000-\U0010ffff]"
)

_TWO_WORDS = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"), "gimme": ("gim", "me")}
_TITLES = "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|co|inc|ltd|no|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|a\\.m|p\\.m"

_TOKEN = re.compile(
    rf"""
      https?://\S+ | [\w.+-]+@[\w-]+\.[\w.-]+ | </?[a-z][^<>]*>     # addresses and tags stay whole
    | [\#@][^\W\d]\w*
    | \.\.\.+ | --+ | [?!]+ | _+                                    # runs are one token
    | (?:[a-z]\.){{2,}} | \b(?:{_TITLES})\.(?!\w)                   # u.s., e.g., mr.
    | n't\b | '(?:s|m|d|ll|re|ve)\b
    | 'n' | '(?:em|cause)\b | 't(?=(?:is|was)\b) | '\d0s\b | \by'(?=[a-z])
    | \bc\+\+ | \b[cf]\#
    | \+\d+(?:-\d+){{3}} | [+-]\d+(?:[.,:/]\d+)*                    # a telephone number, a signed number
    | [a-z\d]+/[a-z\d]+(?=[가-힣])                                   # km/h | 로
    | \d+(?:[.,:/]\d+)+(?:(?=\D)|$)                                 # 3.5 | km, 1,000 | 원: but 3명 is one word
    | [^\W_]+?(?=n't\b)
    | o'clock\b | [^\W_](?:\w|[-.&/](?=\w))*(?<!_)                  # state-of-the-art; a full stop inside a word does not end it
    | \S
    """,
    re.VERBOSE,
)


def split_ptb(text: str) -> list[str]:
    """The lower-case Penn Treebank tokens of normalised text, without the punctuation that COCO's evaluation removes.

    English contractions are split ("isn't" gives "is", "n't"), brackets become "-lrb-" and the like, a number with a separator parts from
    its unit ("3.5km" gives "3.5", "km"). The module lists what differs from the jar.

    Args:
        text: Text on one line.

    Returns:
        The tokens.
    """
    text = _ENTITY.sub(lambda entity: _ENTITIES[entity[0]], _UNKNOWN.sub(" ", text.translate(_QUOTES)))
    tokens: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        if token in _DROPPED or token == '"' or token.startswith("...") or token.strip("-") == "":
            continue
        tokens.extend(_TWO_WORDS.get(token, (_RENAMED.get(token, token),)))
    return tokens
