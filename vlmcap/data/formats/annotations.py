"""Shared functions of the readers: annotation files, one per split or one for all, and records from their entries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vlmcap.config import AnnotatedConfig, KeyedConfig, MediaConfig, PatternConfig
from vlmcap.data.formats.keys import Captions, text_at, value_at, why_no_caption
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.data.media import MediaError, read_text
from vlmcap.data.media.roots import OutsideRootError, annotation_files, relative_address, resolve_media
from vlmcap.data.splits import KOREAN_ENDING, SPELLINGS
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped

_MAX_NAMED_KEYS = 12


def annotation_sources(settings: AnnotatedConfig, split: str | None) -> list[tuple[str, str]]:
    """Returns splits and addresses of the annotation files; the split is "" unless `data.annotations` has `{split}`.

    `{split}` stands for `train`, `val`, `test` and their other spellings, of which the first that finds files is used.

    Raises:
        UserError: There is no file for the split, or no file at all.
    """
    pattern = settings.annotations or ""
    if "{split}" not in pattern:
        return [("", address) for address in annotation_files(settings)]
    split_of: dict[str, str] = {}
    # All splits are looked up, as a file may match the spelling of two.
    for name in dict.fromkeys([*SPELLINGS, *([split] if split else [])]):
        for address in _first_spelling(settings, pattern, name):
            if split_of.setdefault(address, name) != name:
                raise UserError(
                    f"data.annotations={pattern}: {address} could belong to {split_of[address]} or to {name}; rename it"
                )
    wanted = [(name, address) for address, name in split_of.items() if split in (None, name)]
    if not wanted:
        # Raises an error that lists the existing files, if there is no file at all.
        annotation_files(replace(settings, annotations=pattern.replace("{split}", split or "train")))
        raise UserError(
            f"data.annotations={pattern} finds no file below data.root={settings.root} that names the split "
            f"{split or 'train'}; rename a file, or set data.annotations"
        )
    return wanted


def _first_spelling(settings: AnnotatedConfig, pattern: str, split: str) -> list[str]:
    for spelling in SPELLINGS.get(split, (split,)):
        try:
            files = annotation_files(replace(settings, annotations=pattern.replace("{split}", spelling)))
        except UserError:
            continue
        # The spelling must be a separate word: `constrained_val.jsonl` is not a training file.
        word = re.compile(rf"(?<![a-z가-힣]){re.escape(spelling)}{KOREAN_ENDING}(?![a-z가-힣])", re.IGNORECASE)
        if named := [address for address in files if word.search(relative_address(address, settings.root))]:
            return named
    return []


def load_json(address: str) -> Any:
    """Loads a whole JSON file, which takes about five times its size in memory.

    Raises:
        UserError: The file cannot be read or is not JSON in UTF-8.
    """
    try:
        return json.loads(read_text(address))
    except MediaError as error:
        raise UserError(f"data.annotations: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.annotations: {address} is not JSON ({error}); copy it again, or name another file"
        ) from error


def json_list(content: Any, address: str, key: str | None = None) -> list[Any]:
    """Returns the list in a JSON file, which is its content or at `key` of it.

    Raises:
        UserError: There is no such list.
    """
    entries = content if key is None else content.get(key) if isinstance(content, dict) else None
    if isinstance(entries, list):
        return entries
    wanted = "a list of entries" if key is None else f"an object with a list '{key}'"
    raise UserError(
        f"data.annotations: {address} contains {_describe(content)} instead of {wanted}; name another file, or choose "
        "another data=NAME"
    )


def list_entries(settings: AnnotatedConfig, split: str | None) -> Iterator[tuple[str, int, Any]]:
    """Yields split, number and value of each entry of annotation files that are lists.

    Raises:
        UserError: There is no file, or one is not a list.
    """
    for name, address in annotation_sources(settings, split):
        for number, entry in enumerate(json_list(load_json(address), address)):
            yield name, number, entry


def json_lines(address: str) -> Iterator[tuple[int, Any | Skipped]]:
    """Yields numbers and values of the non-empty lines of a JSON Lines file; a `Skipped` if a line is not JSON.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        text = read_text(address)
    except MediaError as error:
        raise UserError(f"data.annotations: {error}") from error
    # Not `splitlines`, which also splits at U+2028 inside captions.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, skip(f"line {number}", f"line {number} of {address} is not JSON ({error})")


def name_at(entry: Any, key: str) -> str:
    """Returns the file name at a dotted path, with its blanks; "" if there is none."""
    value = value_at(entry, key)
    return value if isinstance(value, str) else text_at(entry, key)


def media_name(settings: PatternConfig, id: str) -> str:
    """Returns the file name of a clip by its id and `data.media_pattern`."""
    return settings.media_pattern.replace("{id}", id)


def make_record(
    settings: MediaConfig,
    id: str,
    files: Sequence[str],
    captions: Captions,
    entry: Any,
    *,
    split: str = "",
    group: str = "",
) -> Record | Skipped:
    """Builds the record of an entry, or a `Skipped`: it has no caption, or a file is missing or outside the root.

    Args:
        settings: Configuration of the data set.
        id: Id of the clip.
        files: A video or image, or several images that are the frames of one clip.
        captions: Captions from `captions_at`.
        entry: Entry that contains the captions and the category.
        split: Split by the data set; "" if unknown.
        group: Name of the source, which must not be in two splits.
    """
    if not captions.texts:
        assert isinstance(settings, KeyedConfig), "other formats have no entries without a caption"
        return skip(
            id,
            f"no caption at data.caption_key={settings.caption_key}{why_no_caption(entry, settings.caption_key)}",
            files[0],
        )
    try:
        addresses = tuple(resolve_media(settings, name) for name in files)
    except OutsideRootError as error:
        return skip(id, str(error), files[0])
    category = text_at(entry, settings.category_key) if settings.category_key else ""
    # Several files are images of one clip, a single file is a video or an image.
    frames = addresses if len(addresses) > 1 else ()
    return Record(Clip(id, addresses[0], captions.texts, category, frames), split, group, captions.num_empty)


def checked(entries: Entries, settings: AnnotatedConfig) -> Entries:
    """Yields the entries if at least one is good.

    Raises:
        UserError: There are none, or all are bad, which points to the settings and not to the data.
    """
    bad: list[Skipped] = []
    for entry in entries:
        if isinstance(entry, Record):
            # The skipped entries before the first good one, in their order.
            yield from bad
            yield entry
            yield from entries
            return
        bad.append(entry)
    if not bad:
        raise UserError(
            f"data.annotations={settings.annotations} has no entries below data.root={settings.root}; name another file"
        )
    raise UserError(
        f"none of the {len(bad)} entries of data.annotations={settings.annotations} can be used, the first being "
        f"{bad[0].clip.id} ({bad[0].reason}); check the keys of data"
    )


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    more = f" and {len(content) - _MAX_NAMED_KEYS} more" if len(content) > _MAX_NAMED_KEYS else ""
    return (
        f"an object with the keys {', '.join(list(content)[:_MAX_NAMED_KEYS])}{more}" if content else "an empty object"
    )
