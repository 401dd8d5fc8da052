"""LLaVA conversations: a JSON list, or JSON Lines, of `id`, `image` or `video`, and `conversations`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vlmcap.config import LlavaConfig
from vlmcap.data.formats.annotations import annotation_sources, checked, json_lines, json_list, load_json, make_record
from vlmcap.data.formats.keys import Captions, text_at, value_at
from vlmcap.data.formats.record import Entries, Record, skip
from vlmcap.data.text import normalize_caption
from vlmcap.types import Skipped

_TAG = re.compile(r"<(?:image|video)>")
_ANSWERERS = ("gpt", "assistant")


def read_llava(settings: LlavaConfig, split: str | None = None) -> Entries:
    """Yields a record for each conversation, whose caption is the first answer; questions and later turns are left out.

    Turns have `from` and `value`. A list under `image` gives the frames of one clip. Repeated ids, as in mixtures, get
    a number: `000123`, `000123#2`.

    Raises:
        UserError: A file is not such a list, or no conversation can be used.
    """
    return checked(_entries(settings, split), settings)


def _entries(settings: LlavaConfig, split: str | None) -> Entries:
    seen: Counter[str] = Counter()
    for name, address in annotation_sources(settings, split):
        for number, entry in _conversations(address):
            yield entry if isinstance(entry, Skipped) else _record(settings, entry, number, name, seen)


def _conversations(address: str) -> Iterator[tuple[int, Any | Skipped]]:
    if address.rpartition("::")[0].endswith(".jsonl") or address.endswith(".jsonl"):
        yield from json_lines(address)
    else:
        yield from enumerate(json_list(load_json(address), address))


def _record(settings: LlavaConfig, entry: Any, number: int, split: str, seen: Counter[str]) -> Record | Skipped:
    files = _files(entry)
    id = text_at(entry, "id") or (files[0].rpartition(".")[0] if files else f"entry {number}")
    seen[id] += 1
    # The second conversation about one image gets "#2".
    if seen[id] > 1:
        id = f"{id}#{seen[id]}"
    if not files:
        return skip(id, "the conversation has neither an image nor a video")
    answer = _first_answer(entry)
    if not answer:
        return skip(id, "the conversation has no turn with text from 'gpt'", files[0])
    return make_record(settings, id, files, Captions((answer,)), entry, split=split)


def _files(entry: Any) -> list[str]:
    for key in ("video", "image"):
        value = value_at(entry, key)
        files = value if isinstance(value, list) else [value]
        if files and all(isinstance(file, str) and file for file in files):
            return files
    return []


def _first_answer(entry: Any) -> str:
    turns = value_at(entry, "conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("from") in _ANSWERERS:
            value = turn.get("value")
            return normalize_caption(_TAG.sub(" ", value)) if isinstance(value, str) else ""
    return ""
