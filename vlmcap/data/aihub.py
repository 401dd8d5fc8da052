"""Clips of the AI Hub layout: `{root}/{split}/videos/*.mp4` and `{root}/{split}/labels/*.json`, paired by their stems."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmcap.data.text import normalize_caption
from vlmcap.errors import UserError
from vlmcap.types import Clip

_MAX_KEYS_NAMED = 12


def load_aihub(root: str | Path, split: str, caption_key: str = "annotation.description_kr") -> list[Clip]:
    """The clips of a split, sorted by id, with NFC captions.

    The id is the label's path below `labels/` without its ending, so sub-folders keep equal stems apart; the same sub-folders are
    expected below `videos/`. Names are compared in NFC, since some systems decompose Hangul in file names. Hidden files are ignored.

    Args:
        root: Folder of the data set.
        split: Name of a folder in it, such as "train".
        caption_key: Dotted path of the caption in a label; a number picks from a list. The value is a string or a list of strings.

    Raises:
        UserError: A folder is missing or empty, a label is no JSON or has no caption, a video is missing, or a link leaves `root`.
    """
    folder = _split_folder(Path(root), split)
    labels = _files_by_id(folder / "labels", ".json", Path(root))
    if not labels:
        raise UserError(f"there are no labels in {folder / 'labels'}: put the .json files there or choose another split")
    videos = _files_by_id(folder / "videos", ".mp4", Path(root))
    missing = [name for name in labels if name not in videos]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(labels)} labels have no video, first: {folder / 'videos' / missing[0]}.mp4 for {labels[missing[0]]}; "
            "add the videos or remove the labels"
        )
    captions = _read_captions(labels, caption_key)
    return [Clip(id=name, video=videos[name], captions=captions[name]) for name in labels]


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise UserError(f"data.root is {root}, which is no folder: set it to the folder that holds train/, val/ and test/")
    splits = sorted(child.name for child in root.iterdir() if (child / "labels").is_dir())
    if split not in splits:  # comparing with what is there also refuses names such as ".."
        there = ", ".join(splits) or "none; a split is a folder with videos/ and labels/ in it"
        raise UserError(f"{root} has no split '{split}': choose one of those it has ({there}) or set data.root")
    if not (root / split / "videos").is_dir():
        raise UserError(f"{root / split / 'videos'} is missing: put the .mp4 files of the labels there")
    return root / split


def _files_by_id(folder: Path, suffix: str, root: Path) -> dict[str, Path]:
    """Path below `folder` without its ending, in NFC -> file; sorted by that id."""
    found: dict[str, Path] = {}
    real_root = os.path.realpath(root)
    _refuse_outside(folder.parent, real_root)
    _refuse_outside(folder, real_root)
    for path in _walk(folder, suffix, real_root):
        name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        if name in found:
            raise UserError(f"{found[name]} and {path} stand for one clip: remove one of them")
        found[name] = path
    return dict(sorted(found.items()))


def _walk(folder: Path, suffix: str, real_root: str) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith("."):  # .DS_Store, ._clip.json of archives made on macOS
            continue
        if entry.is_symlink():
            _refuse_outside(path, real_root)
        if entry.is_dir():
            is_circle = entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))
            if not is_circle:
                yield from _walk(path, suffix, real_root)
        elif path.suffix.lower() == suffix and entry.is_file():
            yield path


def _refuse_outside(path: Path, real_root: str) -> None:
    """`UserError` if `path`, links resolved, lies outside `real_root`."""
    if not Path(os.path.realpath(path)).is_relative_to(real_root):
        raise UserError(f"{path} is a link out of data.root: copy the files there, or set data.root to the folder that really holds them")


def _read_captions(labels: dict[str, Path], caption_key: str) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    unreadable: list[tuple[Path, str]] = []
    bare: list[tuple[Path, str]] = []
    for name, path in labels.items():
        try:
            label = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            unreadable.append((path, str(error)))
            continue
        found = _captions_at(label, caption_key)
        if found:
            captions[name] = found
        else:
            bare.append((path, _describe_keys(label)))
    if unreadable:
        path, why = unreadable[0]
        raise UserError(f"{len(unreadable)} of {len(labels)} labels are no UTF-8 JSON, first: {path} ({why}); repair or remove them")
    if bare:
        path, keys = bare[0]
        raise UserError(
            f"{len(bare)} of {len(labels)} labels have no caption at data.caption_key={caption_key}, first: {path}, "
            f"which has {keys}; set data.caption_key, or repair or remove the labels"
        )
    return captions


def _captions_at(label: Any, caption_key: str) -> tuple[str, ...]:
    """The captions at a dotted path, normalised; empty where the path leads nowhere or to something else than text."""
    value = label
    for part in caption_key.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return ()
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(caption for text in texts if (caption := normalize_caption(text)))


def _describe_keys(label: Any) -> str:
    paths = list(_text_paths(label, ""))
    more = f" and {len(paths) - _MAX_KEYS_NAMED} more" if len(paths) > _MAX_KEYS_NAMED else ""
    return ("text at " + ", ".join(paths[:_MAX_KEYS_NAMED]) + more) if paths else "no text at any key"


def _text_paths(value: Any, prefix: str) -> Iterator[str]:
    """Dotted paths of all non-empty text in a label, a list of strings counting as one."""
    if isinstance(value, str):
        if value.strip() and prefix:
            yield prefix
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        yield prefix or "0"
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _text_paths(item, f"{prefix}.{key}" if prefix else str(key))
