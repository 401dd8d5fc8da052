"""What the readers of published layouts share.

Files of captions, a split each where they are so, and entries out of them.
"""

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

_MAX_NAMED = 12


def annotation_sources(settings: AnnotatedConfig, split: str | None) -> list[tuple[str, str]]:
    """Splits and addresses of the annotation files; the split is "" unless `data.annotations` has `{split}` in it.

    `{split}` stands for `train`, `val`, `test` and their other spellings, of which the first that finds files counts.

    Raises:
        UserError: There is no file for the split, or for any.
    """
    pattern = settings.annotations or ""
    if "{split}" not in pattern:
        return [("", address) for address in annotation_files(settings)]
    found: dict[str, str] = {}
    for name in dict.fromkeys([*SPELLINGS, *([split] if split else [])]):
        for address in _first_spelling(settings, pattern, name):
            if found.setdefault(address, name) != name:
                raise UserError(
                    f"data.annotations={pattern}: {address} could be of {found[address]} and of {name}; rename it"
                )
    wanted = [(name, address) for address, name in found.items() if split in (None, name)]
    if not wanted:
        annotation_files(
            replace(settings, annotations=pattern.replace("{split}", split or "train"))
        )  # says what there is
        raise UserError(
            f"data.annotations={pattern} finds no file below data.root={settings.root} that names the split "
            f"{split or 'train'}"
        )
    return wanted


def _first_spelling(settings: AnnotatedConfig, pattern: str, split: str) -> list[str]:
    for spelling in SPELLINGS.get(split, (split,)):
        try:
            files = annotation_files(replace(settings, annotations=pattern.replace("{split}", spelling)))
        except UserError:
            continue
        # As a word of its own: `constrained_val.jsonl` is no training file.
        word = re.compile(rf"(?<![a-z가-힣]){re.escape(spelling)}{KOREAN_ENDING}(?![a-z가-힣])", re.IGNORECASE)
        if named := [address for address in files if word.search(relative_address(address, settings.root))]:
            return named
    return []


def load_json(address: str) -> Any:
    """The content of a JSON file, read as a whole: about five times its size in memory while it is read.

    Raises:
        UserError: It cannot be read or is no JSON in UTF-8.
    """
    try:
        return json.loads(read_text(address))
    except MediaError as error:
        raise UserError(f"data.annotations: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.annotations: {address} is no JSON ({error}); copy it again, or name another file"
        ) from error


def json_list(content: Any, address: str, key: str | None = None) -> list[Any]:
    """The list that the content of a JSON file is, or has at `key`.

    Raises:
        UserError: There is no such list.
    """
    found = content if key is None else content.get(key) if isinstance(content, dict) else None
    if isinstance(found, list):
        return found
    wanted = "a list of entries" if key is None else f"an object with a list '{key}'"
    raise UserError(
        f"data.annotations: {address} is {_describe(content)} where {wanted} belongs: name another file, or choose "
        "another data=NAME"
    )


def list_entries(settings: AnnotatedConfig, split: str | None) -> Iterator[tuple[str, int, Any]]:
    """Split, number and value of each entry of annotation files that are lists.

    Raises:
        UserError: There is no file, or one is no list.
    """
    for name, address in annotation_sources(settings, split):
        for number, entry in enumerate(json_list(load_json(address), address)):
            yield name, number, entry


def json_lines(address: str) -> Iterator[tuple[int, Any | Skipped]]:
    """Numbers and values of the lines of a JSON Lines file, empty ones left out; a `Skipped` where a line is no JSON.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        text = read_text(address)
    except MediaError as error:
        raise UserError(f"data.annotations: {error}") from error
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # not splitlines, which also splits at U+2028 inside of captions
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, skip(f"line {number}", f"line {number} of {address} is no JSON ({error})")


def name_at(entry: Any, key: str) -> str:
    """The name of a file at a dotted path, blanks and all; "" where there is none."""
    value = value_at(entry, key)
    return value if isinstance(value, str) else text_at(entry, key)


def media_name(settings: PatternConfig, id: str) -> str:
    """The file of a clip that is named by its id, after `data.media_pattern`."""
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
    """The record of an entry, or why there is none: no caption, or a file that is missing or lies outside the root.

    Args:
        settings: Of the data set.
        id: Of the clip.
        files: A video or image, or several images that are the frames of one clip.
        captions: As `captions_at` gives them.
        entry: What the captions and the category come from.
        split: As the data set has it.
        group: Names the source that must not be in two splits.
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
    frames = addresses if len(addresses) > 1 else ()
    return Record(Clip(id, addresses[0], captions.texts, category, frames), split, group, captions.num_empty)


def checked(entries: Entries, settings: AnnotatedConfig) -> Entries:
    """The entries, unless none is good.

    Raises:
        UserError: There are none, or all are bad, which is a mistake in the settings and not in the data.
    """
    bad: list[Skipped] = []
    for entry in entries:
        if isinstance(entry, Record):
            yield from bad
            yield entry
            yield from entries
            return
        bad.append(entry)
    if not bad:
        raise UserError(
            f"data.annotations={settings.annotations} has no entries below data.root={settings.root}: name another file"
        )
    first = f"{bad[0].clip.id}: {bad[0].reason}"
    raise UserError(
        f"none of the {len(bad)} entries of data.annotations={settings.annotations} can be used, first {first}"
    )


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    more = f" and {len(content) - _MAX_NAMED} more" if len(content) > _MAX_NAMED else ""
    return f"an object with the keys {', '.join(list(content)[:_MAX_NAMED])}{more}" if content else "an empty object"
