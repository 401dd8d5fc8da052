"""The files below a data set's root; an archive counts as a folder of its name, whose members are read in place."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from vlmcap.data.formats.record import skip
from vlmcap.data.media import MediaError, list_members, member_address
from vlmcap.errors import UserError
from vlmcap.types import Skipped

ARCHIVES = (".zip", ".tar")
Outside = Literal["refuse", "skip", "follow"]
"""What is done with links that leave the root."""


@dataclass(frozen=True, slots=True)
class TreeFile:
    """A file by its path below the root, in NFC and with `/`, and by its address."""

    path: str
    address: str


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive by the folder that it stands for ("" for the root itself), and why it cannot be read, if it cannot."""

    folder: str
    file: str
    error: str = ""


def is_archive(place: str) -> bool:
    """Whether the name is that of an archive that is read in place."""
    return PurePosixPath(place).suffix.lower() in ARCHIVES


def list_files(root: str, outside: Outside = "refuse") -> Iterator[TreeFile | Skipped]:
    """Every file below `root`, members of archives included; hidden files are left out, broken archives are named.

    Raises:
        UserError: `root` is no folder and no archive, or a link leaves it.
    """
    if is_archive(root) and ("://" in root or os.path.isfile(root)):
        yield from _members(root, "")
        return
    for path in walk(root, outside):
        relative = unicodedata.normalize("NFC", os.path.relpath(path, root)).replace(os.sep, "/")
        if is_archive(path):
            yield from _members(path, os.path.splitext(relative)[0])
        else:
            yield TreeFile(relative, path)


def walk(root: str, outside: Outside = "refuse") -> Iterator[str]:
    """Paths of the regular files below a folder, sorted in each folder, hidden ones left out.

    Links to folders above themselves are not followed.

    Raises:
        UserError: `root` is no folder, or a link leaves it.
    """
    if not os.path.isdir(root):
        raise _no_folder(root)
    yield from _walk(root, os.path.realpath(root), outside)


def _walk(folder: str, real_root: str, outside: Outside) -> Iterator[str]:
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        if outside != "follow" and entry.is_symlink() and not is_below(os.path.realpath(entry.path), real_root):
            if outside == "skip":
                continue
            raise UserError(
                f"{entry.path} is a link out of data.root: copy the files there, set data.root to the folder that really holds them, "
                "or set data.allow_outside=true"
            )
        if entry.is_dir():
            is_circle = entry.is_symlink() and is_below(os.path.realpath(folder), os.path.realpath(entry.path))
            if not is_circle:
                yield from _walk(entry.path, real_root, outside)
        elif entry.is_file():
            yield entry.path


def _no_folder(root: str) -> UserError:
    return UserError(f"data.root is {root}, which is no folder (and no .zip or .tar file): set it to the folder that holds the data set")


def is_below(real: str, real_root: str) -> bool:
    """Whether a path is `real_root` or lies below it; both with their links resolved."""
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)


def archives_below(root: str, outside: Outside = "skip") -> tuple[Archive, ...]:
    """The archives below `root`, or `root` itself; looked for once in a process, and again when `root` changes.

    Raises:
        UserError: `root` is neither a folder nor an archive.
    """
    if is_archive(root) and ("://" in root or os.path.isfile(root)):
        return (_archive(root, ""),)
    if not os.path.isdir(root):
        raise _no_folder(root)
    status = os.stat(root)
    return _archives_below(root, outside, (status.st_dev, status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _archives_below(root: str, outside: Outside, version: tuple[int, ...]) -> tuple[Archive, ...]:
    found = [path for path in walk(root, outside) if is_archive(path)]
    return tuple(_archive(path, os.path.splitext(Path(path).relative_to(root).as_posix())[0]) for path in found)


def _archive(path: str, folder: str) -> Archive:
    try:
        list_members(path)
    except MediaError as error:
        return Archive(folder, path, str(error))
    return Archive(folder, path)


def _members(path: str, folder: str) -> Iterator[TreeFile | Skipped]:
    try:
        members = list_members(path)
    except MediaError as error:
        yield skip(folder or path, str(error), path)
        return
    for member in members:
        parts = [part for part in member.name.replace("\\", "/").split("/") if part not in ("", ".", "..")]  # a label, not a path to open
        if parts and not any(map(_is_hidden, parts)):
            inner = unicodedata.normalize("NFC", "/".join(parts))
            yield TreeFile(f"{folder}/{inner}" if folder else inner, member_address(path, member.name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # .DS_Store, and ._clip.json of archives made on macOS
