"""Precision and recall of content words by class: whether captions name what is in the video, in any wording.

The part of speech by mecab-ko decides which morphemes carry content: common nouns (NNG), proper nouns (NNP), verbs
(VV), adjectives (VA and roots, XR), numbers (SN, NR and counting determiners such as 두), and foreign words (SL, SH:
BBC, 漢字). Stems are compared, so tense and particles do not count; 하다, 되다, 있다, 없다 are left out, as are bound
nouns and adverbs. A word matches the same word of the same class, as often as both have it. Order does not count, and
neither does the meaning: a caption may use the right words for the wrong thing.

    precision = matched words / content words of the captions
    recall    = matched words / content words of the references

summed over clips and, if there are several references, over the one with the best F1 (recall then refers to that one,
not to all together).
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
    """Computes precision, recall and F1 of content words over all classes, and precision and recall of each class.

    Args:
        predictions: One text per clip, which is normalized here.
        references: One or more texts per clip.
        synonyms: Word to list of equivalent words, or the path of a JSON file with such an object; see `load_synonyms`.

    Returns:
        `content_precision`, `content_recall`, `content_f1`, and for each class such as noun `content/noun_precision`,
        `content/noun_recall`; each between 0 and 1, NaN if there is no such word.

    Raises:
        UserError: As in `score_captions`, the synonyms contradict each other or cannot be read, or mecab-ko is not
            installed.
    """
    return content_from_counts(content_counts(predictions, references, synonyms).sum(0))


def content_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], synonyms: Synonyms | str | Path | None = None
) -> npt.NDArray[np.int64]:
    """Counts, for each clip and class, the words matched, in the prediction, and in the reference, (N, 6, 3).

    Classes are in the order of `CONTENT_CLASS_NAMES`. Arguments and errors are those of `content_scores`.
    """
    check_captions(predictions, references)
    groups = load_synonyms(synonyms)
    predicted = [_content_words(morphemes, groups) for morphemes in analyze_many(predictions)]
    # All references in one call, which analyzes equal texts one time.
    flat = iter(analyze_many([reference for refs in references for reference in refs]))
    counts = np.zeros((len(predictions), len(CONTENT_CLASS_NAMES), 3), np.int64)
    for index, refs in enumerate(references):
        # The reference with the highest F1 counts, as people describe different things.
        candidates = [_count(predicted[index], _content_words(next(flat), groups)) for _ in refs]
        counts[index] = max(candidates, key=_f1)
    return counts


def content_from_counts(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Computes the scores of `content_scores` from counts summed over clips, shape (6, 3)."""
    matched, predicted, true = (int(number) for number in counts.sum(0))
    scores = {
        "content_precision": _ratio(matched, predicted),
        "content_recall": _ratio(matched, true),
        "content_f1": _ratio(2 * matched, predicted + true),
    }
    for name, (matched, predicted, true) in zip(CONTENT_CLASS_NAMES, counts.tolist(), strict=True):
        scores[f"content/{name}_precision"] = _ratio(matched, predicted)
        scores[f"content/{name}_recall"] = _ratio(matched, true)
    return scores


def load_synonyms(synonyms: Synonyms | str | Path | None) -> dict[str, str]:
    """Maps each word and each stem of the synonyms to the word that represents its group.

    Words are written as in a dictionary: "달리다": ["뛰다", "질주하다"] applies to every form of these verbs. Within a
    group only words of the same class match: a noun does not match a verb.

    Args:
        synonyms: Word to list of words, the path of a UTF-8 JSON file with such an object, or None.

    Raises:
        UserError: The file cannot be read or has other content, or a word is in two groups.
    """
    if synonyms is None:
        return {}
    # The source is named in errors.
    given, where = (_read(synonyms), str(synonyms)) if isinstance(synonyms, str | Path) else (synonyms, "The synonyms")
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be an object of words, each with a list of equivalent words.")
    group: dict[str, str] = {}
    for word, others in given.items():
        if not isinstance(others, list | tuple) or not all(
            isinstance(other, str) and other.strip() for other in (word, *others)
        ):
            raise UserError(f"{where}: {word!r} needs a list of equivalent words, none of them empty.")
        # Both forms of each word: a user writes 달리다, and captions contain its stem, "달리-".
        for form in dict.fromkeys(form for other in (word, *others) for form in _dictionary_forms(other)):
            # A form belongs to one group, or a word would be equivalent to two words that differ.
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
        raise UserError(f"Cannot read the synonyms {path} ({error}); check the path and the JSON.") from error


def _dictionary_forms(word: str) -> list[str]:
    """Returns the word and, if it may be a verb's dictionary form, its stem followed by "-".

    mecab-ko returns stems, and the noun 이동 for 이동하다.
    """
    word = normalize(word).lower()
    # A noun with 하다 or 되다 is that noun in mecab's morphemes: 운동하다 is 운동 + 하 + 다.
    for ending in ("하다", "되다"):
        if len(word) > len(ending) and word.endswith(ending):
            return [word.removesuffix(ending), word.removesuffix("다") + "-"]
    return [word, word.removesuffix("다") + "-"] if len(word) > 1 and word.endswith("다") else [word]


def _content_words(morphemes: list[Morpheme], groups: Mapping[str, str]) -> _Words:
    words: _Words = Counter()
    for morpheme in morphemes:
        name = morpheme.content_class
        if name is not None:
            # The "-" keeps a stem from being taken for a noun of the same form.
            key = f"{morpheme.form}-" if morpheme.tag in ("VV", "VA") else morpheme.form
            words[name, groups.get(key, key)] += 1
    return words


def _count(predicted: _Words, true: _Words) -> npt.NDArray[np.int64]:
    counts = np.zeros((len(CONTENT_CLASS_NAMES), 3), np.int64)
    # The intersection of two counters has the smaller count of each word.
    for column, words in enumerate((predicted & true, predicted, true)):
        for (name, _), number in words.items():
            counts[CONTENT_CLASS_NAMES.index(name), column] += number
    return counts


def _f1(counts: npt.NDArray[np.int64]) -> float:
    matched, predicted, true = counts.sum(0)
    return 2 * matched / (predicted + true) if predicted + true else 0.0


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
