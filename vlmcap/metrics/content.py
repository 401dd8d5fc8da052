"""Precision and recall of content words by class: does the caption name what is there, in whatever words around it?

mecab-ko says which morphemes carry content: common nouns (NNG), proper nouns (NNP), verbs (VV), adjectives (VA and
roots, XR), numbers (SN, NR and counting determiners such as 두), and foreign words (SL, SH: BBC, 漢字). Stems are
compared, so tense and particles do not count; 하다, 되다, 있다, 없다 are left out, as are bound nouns and adverbs. A
word matches the same word of the same class, as often as both have it. Order does not count, and neither does the
clip's meaning: a caption may say the right words of the wrong thing.

    precision = matched words / content words of the captions,   recall = matched words / content words of the
    references

summed over clips and, of several references, over the one with the best F1 (its recall is of that one, not of all
together).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmcap.errors import UserError
from vlmcap.metrics.captions import check_captions
from vlmcap.metrics.morphemes import Morpheme, analyze_many
from vlmcap.metrics.tokenizers import normalize

CONTENT_CLASS_NAMES: tuple[str, ...] = ("noun", "proper", "verb", "adjective", "number", "foreign")
Synonyms = Mapping[str, Sequence[str]]
_Words = Counter[tuple[str, str]]  # class and stem


def content_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], synonyms: Synonyms | str | Path | None = None
) -> dict[str, float]:
    """Content-word precision, recall and F1 over all classes, and precision and recall of each class.

    Args:
        predictions: One text a clip; normalised here.
        references: For each clip one or more texts.
        synonyms: Word to list of words that count as the same, or the path of a JSON file that holds such an object;
            see `load_synonyms`.

    Returns:
        `content_precision`, `content_recall`, `content_f1`, and for each class such as noun `content/noun_precision`,
        `content/noun_recall`; each between 0 and 1, NaN where there is no such word to be right about.

    Raises:
        UserError: As in `score_captions`, the synonyms contradict each other or cannot be read, or mecab-ko is not
            installed.
    """
    return content_from_counts(content_counts(predictions, references, synonyms).sum(0))


def content_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], synonyms: Synonyms | str | Path | None = None
) -> npt.NDArray[np.int64]:
    """What `content_scores` sums.

    For each clip and class the words matched, said, and in the reference, shape (N, 6, 3).

    Classes are in the order of `CONTENT_CLASS_NAMES`. Arguments and errors are those of `content_scores`.
    """
    check_captions(predictions, references)
    same = load_synonyms(synonyms)
    said = [_content(morphemes, same) for morphemes in analyze_many(predictions)]
    flat = iter(analyze_many([reference for refs in references for reference in refs]))
    counts = np.zeros((len(predictions), len(CONTENT_CLASS_NAMES), 3), np.int64)
    for index, refs in enumerate(references):
        candidates = [_count(said[index], _content(next(flat), same)) for _ in refs]
        counts[index] = max(candidates, key=_f1)
    return counts


def content_from_counts(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """The scores of `content_scores` from counts summed over clips, shape (6, 3)."""
    matched, said, there = (int(number) for number in counts.sum(0))
    scores = {
        "content_precision": _ratio(matched, said),
        "content_recall": _ratio(matched, there),
        "content_f1": _ratio(2 * matched, said + there),
    }
    for name, (matched, said, there) in zip(CONTENT_CLASS_NAMES, counts.tolist(), strict=True):
        scores |= {f"content/{name}_precision": _ratio(matched, said), f"content/{name}_recall": _ratio(matched, there)}
    return scores


def load_synonyms(synonyms: Synonyms | str | Path | None) -> dict[str, str]:
    """Each word and each stem of the synonyms to the one word that stands for its group.

    Words are written as in a dictionary: "달리다": ["뛰다", "질주하다"] counts for every form of these verbs. Within a
    group still only words of one class match: a noun does not stand for a verb.

    Args:
        synonyms: Word to list of words, the path of a JSON file with such an object in UTF-8, or None.

    Raises:
        UserError: The file cannot be read, holds something else, or a word is in two groups.
    """
    if synonyms is None:
        return {}
    given, where = (_read(synonyms), str(synonyms)) if isinstance(synonyms, str | Path) else (synonyms, "The synonyms")
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be an object of words, each with a list of words that count as the same.")
    group: dict[str, str] = {}
    for word, others in given.items():
        if not isinstance(others, list | tuple) or not all(
            isinstance(other, str) and other.strip() for other in (word, *others)
        ):
            raise UserError(f"{where}: give {word!r} a list of words that count as the same, none of them empty.")
        for form in dict.fromkeys(form for other in (word, *others) for form in _dictionary_forms(other)):
            if group.setdefault(form, normalize(word)) != normalize(word):
                raise UserError(
                    f"{where}: {form!r} counts as both {group[form]!r} and {normalize(word)!r}; put it into one of "
                    "the lists."
                )
    return group


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the synonyms {path}: {error}.") from error


def _dictionary_forms(word: str) -> list[str]:
    """The word, and as "-" after it the stem if it may be a verb's dictionary form.

    Mecab gives stems, and of 이동하다 the noun 이동.
    """
    word = normalize(word).lower()
    for ending in ("하다", "되다"):
        if len(word) > len(ending) and word.endswith(ending):
            return [word.removesuffix(ending), word.removesuffix("다") + "-"]
    return [word, word.removesuffix("다") + "-"] if len(word) > 1 and word.endswith("다") else [word]


def _content(morphemes: list[Morpheme], same: Mapping[str, str]) -> _Words:
    words: _Words = Counter()
    for morpheme in morphemes:
        name = morpheme.content_class
        if name is not None:
            key = f"{morpheme.form}-" if morpheme.tag in ("VV", "VA") else morpheme.form
            words[name, same.get(key, key)] += 1
    return words


def _count(said: _Words, there: _Words) -> npt.NDArray[np.int64]:
    counts = np.zeros((len(CONTENT_CLASS_NAMES), 3), np.int64)
    for column, words in enumerate((said & there, said, there)):
        for (name, _), number in words.items():
            counts[CONTENT_CLASS_NAMES.index(name), column] += number
    return counts


def _f1(counts: npt.NDArray[np.int64]) -> float:
    matched, said, there = counts.sum(0)
    return 2 * matched / (said + there) if said + there else 0.0


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
