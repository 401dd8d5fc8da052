"""WebDataset shards: tar files whose members `KEY.mp4` and `KEY.json` or `KEY.txt` form a clip, local or remote.

Clips become addresses of members, so that order, ranks and resuming work as for single files; a remote clip is one
range request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice, product

from vlmcap.config import WebdatasetConfig
from vlmcap.data.formats.annotations import annotation_sources, checked
from vlmcap.data.formats.keys import Captions, captions_at, text_at, why_no_caption
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.data.media import MediaError, list_members, member_address, read_text
from vlmcap.data.media.roots import relative_address
from vlmcap.data.media.storage import local_file
from vlmcap.data.media.tree import IMAGE_ENDINGS, VIDEO_ENDINGS, is_hidden_path
from vlmcap.data.text import normalize_caption
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped

MEDIA = tuple(ending.removeprefix(".") for ending in VIDEO_ENDINGS + IMAGE_ENDINGS)
"""Endings of videos and images; the first one in this order that a sample has is its clip."""

_LABELS = ("json", "txt")
_MAX_LABEL_BYTES = 16 * 1024**2
_MAX_SHARDS = 100_000
_NUM_REQUESTS = 16  # concurrent requests for labels of remote shards
# Matches "{000..099}" and "{a,b}", and leaves "{split}" alone.
_BRACES = re.compile(r"\{(?!split\})([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class _Sample:
    """The members of one basename in a shard: ending -> address."""

    id: str
    members: dict[str, str] = field(default_factory=dict)


def read_webdataset(settings: WebdatasetConfig, split: str | None = None) -> Entries:
    """Yields a record for each sample, shard by shard; its id is the shard's path below the root and its basename.

    `data.annotations` names the shards: `*.tar`, `{train,val}/*.tar`, `clips-{000..099}.tar`; a `{split}` in it stands
    for the split of a shard. The caption is at `data.caption_key` of the json member, or else it is the whole txt
    member.

    Raises:
        UserError: A shard is missing or broken, or no sample can be used.
    """
    return checked(_entries(settings, split), settings)


def expand_braces(pattern: str) -> list[str]:
    """Expands `{a,b}` and `{000..099}` into a list of patterns, in order; `{split}` is kept.

    Raises:
        UserError: Braces contain something else, or there are more than 100 000 patterns.
    """
    pieces = _BRACES.split(pattern)
    # `split` with a group returns text and content of braces in turn.
    choices = [_choices(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    spelled = ["".join(parts) for parts in islice(product(*choices), _MAX_SHARDS + 1)]
    if len(spelled) > _MAX_SHARDS:
        raise UserError(f"data.annotations={pattern} expands to more than {_MAX_SHARDS} names; use * instead")
    return spelled


def _choices(piece: str) -> list[str]:
    numbers = _RANGE.fullmatch(piece)
    if numbers is None:
        if "," not in piece:
            raise UserError(
                f"data.annotations contains {{{piece}}}, which is neither a range like {{000..099}} nor a choice like "
                "{a,b} nor {split}; fix it"
            )
        return piece.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first >= _MAX_SHARDS:
        raise UserError(f"data.annotations contains {{{piece}}}, which must count up, by at most {_MAX_SHARDS}; fix it")
    # "{000..099}" keeps its zeros.
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]


def _entries(settings: WebdatasetConfig, split: str | None) -> Entries:
    seen: set[str] = set()
    for pattern in expand_braces(settings.annotations or ""):
        for name, shard in annotation_sources(replace(settings, annotations=pattern), split):
            if shard not in seen:
                seen.add(shard)
                yield from _shard_entries(settings, shard, name)


def _shard_entries(settings: WebdatasetConfig, shard: str, split: str) -> Entries:
    samples = _samples(settings, shard)
    # A local shard is read faster without threads.
    if local_file(shard) is not None:
        yield from (_record(settings, sample, split) for sample in samples)
        return
    with ThreadPoolExecutor(_NUM_REQUESTS) as threads:
        yield from threads.map(lambda sample: _record(settings, sample, split), samples)


def _samples(settings: WebdatasetConfig, shard: str) -> Iterator[_Sample]:
    """Returns the samples of a shard in its order, without hidden members and those of other endings."""
    try:
        members = list_members(shard)
    except MediaError as error:
        raise UserError(f"data.annotations: {error}, or leave it out of data.annotations") from error
    prefix = relative_address(shard, settings.root).rpartition(".")[0]
    samples: dict[str, _Sample] = {}
    for member in members:
        # Members of one sample differ only in their ending: `a/0001.mp4`, `a/0001.json`.
        key, _, ending = member.name.rpartition(".")
        if key and not is_hidden_path(member.name) and ending.lower() in MEDIA + _LABELS:
            sample = samples.setdefault(key, _Sample(f"{prefix}/{key.removeprefix('./')}"))
            sample.members.setdefault(ending.lower(), member_address(shard, member.name))
    return iter(samples.values())


def _record(settings: WebdatasetConfig, sample: _Sample, split: str) -> Record | Skipped:
    video = next((sample.members[ending] for ending in MEDIA if ending in sample.members), None)
    if video is None:
        return skip(sample.id, f"the sample has no video or image, only {', '.join(sample.members)}")
    try:
        # The caption is in the json member, or else the whole txt member.
        file = sample.members.get("json")
        label = None if file is None else json.loads(read_text(file, _MAX_LABEL_BYTES))
        captions = captions_at(label, settings.caption_key)
        if not captions.texts and "txt" in sample.members:
            text = normalize_caption(read_text(sample.members["txt"], _MAX_LABEL_BYTES))
            captions = Captions((text,) if text else ())
    except MediaError as error:
        return skip(sample.id, str(error), video)
    except (ValueError, RecursionError) as error:
        return skip(sample.id, f"{sample.members['json']} is not JSON ({error}); repair it", video)
    if not captions.texts:
        there = (
            why_no_caption(label, settings.caption_key)
            if "json" in sample.members
            else f": it has {', '.join(sample.members)}"
        )
        return skip(
            sample.id, f"no caption in a txt member and none at data.caption_key={settings.caption_key}{there}", video
        )
    category = text_at(label, settings.category_key) if settings.category_key else ""
    return Record(Clip(sample.id, video, captions.texts, category), split, num_empty=captions.num_empty)
