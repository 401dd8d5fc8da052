"""Captions to be scored: reading from files (JSONL, COCO's two JSON files, plain lines) and checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlmcap.errors import UserError


@dataclass(frozen=True, slots=True)
class CaptionFile:
    """A corpus of captions.

    Attributes:
        predictions: One text per clip, in the order of the file.
        references: References of each clip.
        categories: Category of each clip, "" for none.
        num_unused: Number of clips that have references but no prediction.
    """

    predictions: list[str]
    references: list[list[str]]
    categories: list[str]
    num_unused: int = 0


class _Entry(NamedTuple):
    name: str | None
    prediction: Any
    references: Any
    category: str = ""


def read_captions(predictions: Path, references: Sequence[Path] = ()) -> CaptionFile:
    """Reads predictions, with references from the same file or from others.

    Args:
        predictions: JSONL with `prediction`, and optionally `references` (a list, or one text) and `id`; JSON, a list
            of such objects or of COCO's results (`image_id`, `caption`); or text, one caption per line.
        references: Empty if they are in the first file. Else one file of JSONL or JSON with `references` and `id`, or
            COCO's annotations; or text files, whose lines belong to the predictions in order, so that each file gives
            every clip one reference.

    Returns:
        The corpus, whose texts are not checked.

    Raises:
        UserError: A file is missing, not UTF-8 or not as described, or predictions and references do not belong
            together.
    """
    entries = _read_entries(predictions, "prediction")
    if not references:
        lacking = next((index for index, entry in enumerate(entries, start=1) if entry.references is None), None)
        if lacking is not None:
            raise UserError(f"{predictions}: entry {lacking} has no references; name their file with --references.")
        return _corpus(entries, [entry.references for entry in entries])
    if all(_is_text(path) for path in references):
        return _join_lines(entries, references)
    if len(references) > 1:
        raise UserError("Several --references must all be text files; give one file of JSONL or JSON.")
    return _join_names(entries, _read_entries(references[0], "references"), predictions, references[0])


def _join_lines(entries: list[_Entry], paths: Sequence[Path]) -> CaptionFile:
    streams = [_read_lines(path) for path in paths]
    for path, lines in zip(paths, streams, strict=True):
        if len(lines) != len(entries):
            raise UserError(
                f"{path} has {len(lines)} lines but there are {len(entries)} predictions; give one line per prediction."
            )
    # An empty line in one of several files means that this clip has fewer references.
    by_clip = [[line for line in lines if line.strip()] or [lines[0]] for lines in zip(*streams, strict=True)]
    return _corpus(entries, by_clip)


def _join_names(entries: list[_Entry], others: list[_Entry], path: Path, other_path: Path) -> CaptionFile:
    by_name: dict[str, list[Any]] = {}
    for entry in others:
        if entry.name is None or entry.references is None:
            raise UserError(f"{other_path}: each entry needs an id and references; add them.")
        by_name.setdefault(entry.name, []).extend(entry.references)
    # "" if every prediction has references, None for a prediction without an id.
    lacking = next((entry.name for entry in entries if entry.name is None or entry.name not in by_name), "")
    if lacking is None:
        raise UserError(
            f"{path}: the predictions have no ids, so the references in {other_path} cannot be found; add the ids."
        )
    if lacking:
        raise UserError(f"{other_path} has no references for the prediction with id {lacking}; add them.")
    by_clip = [by_name[str(entry.name)] for entry in entries]
    # `_read_entries` has checked that the predictions' ids are distinct, so the difference counts unused names.
    return _corpus(entries, by_clip, len(by_name) - len(entries))


def _corpus(entries: list[_Entry], references: list[list[Any]], num_unused: int = 0) -> CaptionFile:
    return CaptionFile(
        [entry.prediction for entry in entries], references, [entry.category for entry in entries], num_unused
    )


def _read_entries(path: Path, wanted: str) -> list[_Entry]:
    """Reads the entries of one file, whose objects must have the key `wanted`."""
    if _is_text(path):
        return [_Entry(None, line, None) for line in _read_lines(path)]
    content = _read(path)
    # A file that starts with "{" may be one object over several lines, or one object per line.
    if content.lstrip().startswith("[") or (content.lstrip().startswith("{") and _is_one_object(content)):
        values = _parse(content, str(path))
        # COCO's annotations are one object that contains a list.
        if isinstance(values, dict):
            values = values.get("annotations", [values])
        numbered = [(f"{path}: entry {index}", value) for index, value in enumerate(values, start=1)]
    else:
        lines = content.split("\n")
        numbered = [
            (f"{path}, line {n}", _parse(line, f"{path}, line {n}"))
            for n, line in enumerate(lines, start=1)
            if line.strip()
        ]
    entries = [_entry(value, location, wanted) for location, value in numbered]
    seen: set[str] = set()
    for name in (entry.name for entry in entries if entry.name is not None and wanted == "prediction"):
        if name in seen:
            raise UserError(f"{path}: two predictions have the id {name}; give each a unique id.")
        seen.add(name)
    return entries


def _entry(value: Any, location: str, wanted: str) -> _Entry:
    if not isinstance(value, dict):
        raise UserError(f"{location} is not a JSON object; repair or remove it.")
    name = value.get("image_id", value.get("id"))  # COCO's entries have both, and `id` is that of the caption
    text = value.get("caption", _MISSING)
    prediction = value.get("prediction", text)
    # In a file of references, "caption" is a reference, as in COCO's annotations.
    references = value.get("references", value.get("reference", text if wanted == "references" else None))
    if (prediction if wanted == "prediction" else references) is _MISSING:
        keys = ", ".join(map(str, value)) or "none"
        raise UserError(
            f"{location} has no key {wanted} (nor caption, as in COCO's files), its keys are {keys}; add it."
        )
    references = [references] if isinstance(references, str) else references
    category = value.get("category")
    return _Entry(
        None if name is None else str(name), prediction, references, "" if category is None else str(category)
    )


# A key that is missing, in contrast to one whose value is null.
_MISSING = object()


def _is_text(path: Path) -> bool:
    """Returns whether the lines are captions: by the ending, or because the file does not start with a JSON bracket."""
    if path.suffix in {".json", ".jsonl", ".ndjson"}:
        return False
    return path.suffix == ".txt" or _read(path).lstrip()[:1] not in {"{", "["}


def _is_one_object(content: str) -> bool:
    try:
        json.loads(content)
    except json.JSONDecodeError:
        return False
    return True


def _read_lines(path: Path) -> list[str]:
    # Not splitlines(): a U+2028, form feed or lone carriage return inside a caption would shift all pairs after it.
    lines = _read(path).split("\n")
    # The last line is empty if the file ends with a newline, as it should.
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _read(path: Path) -> str:
    try:
        # "utf-8-sig" drops the byte order mark with which some editors begin UTF-8.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error


def _parse(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{location} is not JSON ({error.msg} at column {error.colno}); repair it.") from error


def check_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Checks that there is one prediction and at least one reference per clip; empty texts are allowed.

    Raises:
        UserError: There is no clip, the numbers differ, a text is None or not text, or a clip has no reference.
    """
    for name, given in (("predictions", predictions), ("references", references)):
        if not _is_list(given):
            raise UserError(f"{name} must be a list with an entry for each clip, not {_kind(given)}.")
    if len(predictions) != len(references):
        raise UserError(
            f"There are {len(predictions)} predictions but {len(references)} lists of references; give each clip one "
            "of both."
        )
    if len(predictions) == 0:
        raise UserError("There are no captions to score; give at least one prediction with its references.")
    for index, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise UserError(f"The prediction of clip {index} is {_kind(prediction)}; give a text, which may be empty.")
        if not _is_list(refs):
            raise UserError(
                f"The references of clip {index} are {_kind(refs)}; give a list of texts, also for a single one."
            )
        if len(refs) == 0:
            raise UserError(f"Clip {index} has no reference; leave it out or give it one.")
        for reference in refs:
            if not isinstance(reference, str):
                raise UserError(f"A reference of clip {index} is {_kind(reference)}; give a text.")


def _is_list(value: object) -> bool:
    # A text is a sequence of texts in Python: each character of a lone reference would silently become a reference.
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "a single text"
    return "None" if value is None else f"a {type(value).__name__}"
