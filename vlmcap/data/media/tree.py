"""Files below a data set's root; an archive counts as a folder of its name, whose members are read in place."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from vlmcap.data.formats.record import skip
from vlmcap.data.media import MediaError, list_members, member_address
from vlmcap.errors import UserError
from vlmcap.types import Skipped

VIDEO_ENDINGS = (
    *(".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".asf", ".ts", ".mts", ".m2ts", ".vob"),
    *(".flv", ".3gp", ".ogv"),
)
"""Lower-case endings of video files; if one name has several, the first ending in this list is its clip."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ARCHIVES = (".zip", ".tar")
Outside = Literal["refuse", "skip", "follow"]
"""Treatment of links that leave the root."""


@dataclass(frozen=True, slots=True)
class TreeFile:
    """A file: its path below the root, in NFC and with `/`, and its address."""

    path: str
    address: str


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive: the folder that it counts as ("" for the root itself), its file, and why it cannot be read, if so."""

    folder: str
    file: str
    error: str = ""


@dataclass(slots=True)
class WalkState:
    """State of a walk that enters each folder one time, however many links lead to it, and records what is left out.

    Attributes:
        folders: Folders entered so far, with links resolved.
        links: Links to folders that have not been followed yet.
        num_hidden: Number of hidden files and folders.
        unreadable: Broken links, folders that cannot be opened, and everything that is neither file nor folder.
    """

    folders: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    num_hidden: int = 0
    unreadable: list[str] = field(default_factory=list)


def is_archive(name: str) -> bool:
    """Returns whether the name is that of an archive that can be read in place."""
    return PurePosixPath(name).suffix.lower() in ARCHIVES


def list_files(root: str, outside: Outside = "refuse", state: WalkState | None = None) -> Iterator[TreeFile | Skipped]:
    """Yields every file below `root`, archive members included; hidden files are left out, broken archives reported.

    Raises:
        UserError: `root` is neither a folder nor an archive, or a link leaves it.
    """
    if is_archive(root) and ("://" in root or os.path.isfile(root)):
        yield from _members(root, "", state)
        return
    for path in walk(root, outside, state):
        relative = unicodedata.normalize("NFC", os.path.relpath(path, root)).replace(os.sep, "/")
        if is_archive(path):
            yield from _members(path, os.path.splitext(relative)[0], state)
        else:
            yield TreeFile(relative, path)


def walk(root: str, outside: Outside = "refuse", state: WalkState | None = None) -> Iterator[str]:
    """Yields the paths of the regular files below a folder, sorted within each folder, without hidden ones.

    Links to folders are followed, but not to those that contain the link. With `state`, each folder is visited one
    time, by its real name if that is below `root` too; without it, under every name that leads to it, since annotations
    may use any of them.

    Args:
        root: Folder to walk.
        outside: Treatment of links that leave `root`.
        state: State of the walk, which records what is left out.

    Raises:
        UserError: `root` is not a folder, a folder cannot be opened (without `state`), or a link leaves `root`.
    """
    if not os.path.isdir(root):
        raise _no_folder_error(root)
    real_root = os.path.realpath(root)
    yield from _walk(root, real_root, outside, frozenset(), state)
    while state is not None and state.links:
        yield from _walk(state.links.pop(0), real_root, outside, frozenset(), state)


def _walk(
    folder: str, real_root: str, outside: Outside, above: frozenset[str], state: WalkState | None
) -> Iterator[str]:
    real = os.path.realpath(folder)
    # Without a state, only folders that contain themselves through a link are left out.
    if real in (above if state is None else state.folders):
        return
    if state is not None:
        state.folders.add(real)
    for entry in _entries(folder, state):
        if _is_hidden(entry.name):
            if state is not None:
                state.num_hidden += 1
            continue
        is_link = entry.is_symlink()
        target = os.path.realpath(entry.path) if is_link else entry.path
        if outside != "follow" and is_link and not is_below(target, real_root):
            if outside == "skip":
                continue
            raise UserError(
                f"{entry.path} is a link out of data.root; copy the files there, set data.root to the folder that "
                "contains them, or set data.allow_outside=true"
            )
        # `os.path.isdir` is False for a link to itself, where `entry.is_dir` would raise.
        if os.path.isdir(target) if is_link else entry.is_dir():
            # A link to a folder above it would lead around in circles.
            if is_link and is_below(real, target):
                continue
            if is_link and state is not None:
                state.links.append(entry.path)  # followed last, so that a folder is listed under its real name
            else:
                yield from _walk(entry.path, real_root, outside, above | {real}, state)
        elif os.path.isfile(target) if is_link else entry.is_file():
            yield entry.path
        elif state is not None:
            state.unreadable.append(entry.path)


def _entries(folder: str, state: WalkState | None) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder by name; if it cannot be opened, records that in `state` and returns none."""
    try:
        with os.scandir(folder) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        if state is None:
            raise UserError(
                f"{folder} cannot be read ({error.strerror}); grant read permission, or move the folder away"
            ) from error
        state.unreadable.append(folder)
        return []


def _no_folder_error(root: str) -> UserError:
    return UserError(
        f"data.root={root} is neither a folder nor a .zip or .tar file; set it to the folder that contains the data set"
    )


def is_below(real: str, real_root: str) -> bool:
    """Returns whether a path is `real_root` or below it; both must have their links resolved."""
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)


def archives_below(root: str, outside: Outside = "skip") -> tuple[Archive, ...]:
    """Returns the archives below `root`, or `root` itself; cached in the process until `root` changes.

    Raises:
        UserError: `root` is neither a folder nor an archive.
    """
    if is_archive(root) and ("://" in root or os.path.isfile(root)):
        return (_archive(root, ""),)
    if not os.path.isdir(root):
        raise _no_folder_error(root)
    status = os.stat(root)
    return _archives_below(root, outside, (status.st_dev, status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _archives_below(root: str, outside: Outside, version: tuple[int, ...]) -> tuple[Archive, ...]:
    paths = [path for path in walk(root, outside) if is_archive(path)]
    return tuple(_archive(path, os.path.splitext(Path(path).relative_to(root).as_posix())[0]) for path in paths)


def _archive(path: str, folder: str) -> Archive:
    try:
        list_members(path)
    except MediaError as error:
        return Archive(folder, path, str(error))
    return Archive(folder, path)


def _members(path: str, folder: str, state: WalkState | None) -> Iterator[TreeFile | Skipped]:
    try:
        members = list_members(path)
    except MediaError as error:
        yield skip(folder or path, str(error), path)
        return
    for member in members:
        if is_hidden_path(member.name):
            if state is not None:
                state.num_hidden += 1
        elif parts := _name_components(member.name):
            inner = unicodedata.normalize("NFC", "/".join(parts))
            yield TreeFile(f"{folder}/{inner}" if folder else inner, member_address(path, member.name))


def is_hidden_path(name: str) -> bool:
    """Returns whether a member of an archive is hidden or in a hidden folder."""
    return any(map(_is_hidden, _name_components(name)))


def _name_components(name: str) -> list[str]:
    """Splits a member's name, which is a label and not a path to open, into folders and file."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # .DS_Store, and ._clip.json of archives made on macOS
