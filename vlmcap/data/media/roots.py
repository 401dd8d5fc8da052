"""Files that annotations name, found below the data set's root and nowhere else."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from vlmcap.config import AnnotatedConfig, MediaConfig
from vlmcap.data.media import MediaError, list_members, member_address, parse_address, stat_media
from vlmcap.data.media.storage import list_files as list_remote
from vlmcap.data.media.storage import local_file
from vlmcap.data.media.tree import Archive, archives_below, is_archive, is_below
from vlmcap.errors import UserError

_MEND = "write it relative to data.root, or set data.allow_outside=true"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_MAX_NAMED = 12


class OutsideRootError(Exception):
    """A name in annotations leads to no file inside the root, told in one sentence."""


def resolve_media(settings: MediaConfig, name: str) -> str:
    """The address of a file that annotations name, below `root/media`.

    In NFC and in NFD, in a folder or inside an archive.

    An archive stands for a folder of its name, and for the folder that it lies in. A remote root is not asked whether
    the file is there.

    Raises:
        OutsideRootError: There is no such file, two archives hold it, or the name is an absolute path, has `..` in it,
            is a URL, or goes through a link that leaves the root, unless `allow_outside`.
        UserError: `settings.media` leaves the root.
    """
    if settings.allow_outside and ("://" in name or os.path.isabs(name)):
        return name
    parts = _parts(name, settings.allow_outside)
    try:
        media = os.path.splitext(settings.media)[0] if is_archive(settings.media) else settings.media
        folder = _parts(media, settings.allow_outside, is_folder=True) if media else []
    except OutsideRootError as error:
        raise UserError(f"data.media: {error}") from error
    relative = "/".join([*folder, *parts])
    if "://" in settings.root and not is_archive(settings.root):
        if re.search(r"[%?#]", relative):  # a server may read %2e%2e as ..
            raise OutsideRootError(f"{name!r} has %, ? or # in it, which mean something in a URL: rename the file")
        return f"{settings.root.rstrip('/')}/{relative}"
    found = _local_file(settings, relative) or _member(settings, relative, "/".join(parts))
    if found is None:
        broken = [archive.error for archive in _archives(settings) if archive.error]
        raise OutsideRootError(
            f"there is no file {relative!r} below {settings.root}" + (f"; {broken[0]}" if broken else "")
        )
    return found


def annotation_files(settings: AnnotatedConfig) -> list[str]:
    """Addresses of the files that `data.annotations` names, sorted.

    It is a file or a pattern with `*`, `?` and `**` below the root.

    Raises:
        UserError: There are none, or they lie outside the root.
    """
    pattern, root = settings.annotations, settings.root
    if not pattern:
        raise UserError(
            "data.annotations has no value: set it to the file with the captions, or to a pattern, below data.root"
        )
    if not settings.allow_outside:
        try:
            pattern = "/".join(_parts(pattern, False))
        except OutsideRootError as error:
            raise UserError(f"data.annotations: {error}") from error
    try:
        found = sorted(_matching(settings, pattern))
    except MediaError as error:
        raise UserError(f"data.root={root}: {error}") from error
    if not found:
        raise UserError(
            f"data.annotations={settings.annotations} is no file below data.root={root}; {_whats_there(root, pattern)}"
        )
    return found


def real_address(address: str) -> str:
    """The address with the links on the way to its file resolved: one file has one, however it is spelt.

    Remote ones stay.
    """
    parts = parse_address(address)
    path = local_file(parts.file)
    if path is None:
        return address
    folder, name = os.path.split(path)
    # Links to files are rare, and looking for them in each folder of each file is not for nothing.
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(folder), name)
    return f"{parts.kind}://{parts.member}::{real}" if parts.kind else real


def relative_address(address: str, root: str) -> str:
    """The address as it is below the root, in NFC: the same wherever the data set lies."""
    member, separator, place = address.rpartition("::")
    below = place.removeprefix(root.rstrip("/")).lstrip("/")
    return unicodedata.normalize("NFC", f"{member}{separator}{below}")


def _parts(name: str, allow_outside: bool, *, is_folder: bool = False) -> list[str]:
    """The parts of a relative path; `OutsideRootError` if it is none."""
    if "\0" in name or any("\ud800" <= char <= "\udfff" for char in name):
        raise OutsideRootError(f"{name!r} is no name of a file")
    if is_folder and allow_outside:
        return name.rstrip("/").split("/")
    if "://" in name or "::" in name:
        raise OutsideRootError(f"{name!r} is an address and no file below data.root: {_MEND}")
    if name.startswith(("/", "\\")) or _DRIVE.match(name):
        raise OutsideRootError(f"{name!r} is an absolute path: {_MEND}")
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts and not allow_outside:
        raise OutsideRootError(f"{name!r} has '..' in it: {_MEND}")
    if not parts and not is_folder:
        raise OutsideRootError(f"{name!r} is no name of a file")
    return parts


def _forms(name: str) -> Iterator[str]:
    """Hangul in file names is composed on some systems and decomposed on others."""
    yield from dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)))


def _local_file(settings: AnnotatedConfig, relative: str) -> str | None:
    for form in _forms(relative):
        path = os.path.join(settings.root, form)
        try:
            status = os.lstat(path)
            is_link = stat.S_ISLNK(status.st_mode)
            is_file = stat.S_ISREG((os.stat(path) if is_link else status).st_mode)
        except OSError:
            continue
        if is_file:
            _check_inside(settings, path, is_link=is_link)
            return path
    return None


def _check_inside(settings: AnnotatedConfig, path: str, *, is_link: bool) -> None:
    if settings.allow_outside:
        return
    folder, name = os.path.split(path)
    # A link is followed to its end; for plain files the folder is enough, which saves a look at each of its parents for
    # each file.
    real = os.path.realpath(path) if is_link else os.path.join(_real_folder(folder), name)
    if not is_below(real, _real_folder(settings.root)):
        raise OutsideRootError(
            f"{path!r} is a link out of data.root: copy the file there, or set data.allow_outside=true"
        )


def _real_folder(folder: str) -> str:
    return _real(os.path.abspath(folder))


@lru_cache(maxsize=100_000)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _member(settings: AnnotatedConfig, relative: str, name: str) -> str | None:
    """The address of the member of an archive below the root that has this path, or this name."""
    archives = [archive for archive in _archives(settings) if not archive.error]
    below = [
        (a, relative.removeprefix(a.folder).lstrip("/"))
        for a in archives
        if relative.startswith(f"{a.folder}/" if a.folder else "")
    ]
    for candidates in (below, [(a, relative) for a in archives], [(a, name) for a in archives]):
        found = [address for archive, member in candidates if (address := _existing(archive.file, member))]
        if len(found) > 1:
            raise OutsideRootError(
                f"{found[0]} and {found[1]} have the same name: set data.media to the archive that is meant"
            )
        if found:
            return found[0]
    return None


def _archives(settings: AnnotatedConfig) -> tuple[Archive, ...]:
    return archives_below(settings.root, "follow" if settings.allow_outside else "skip")


def _existing(archive: str, member: str) -> str | None:
    for form in _forms(member):
        address = member_address(archive, form)
        try:
            stat_media(address)
        except MediaError:
            continue
        return address
    return None


def _matching(settings: AnnotatedConfig, pattern: str) -> Iterator[str]:
    root = settings.root
    if is_archive(root) and not os.path.isdir(root):
        for member in list_members(root):
            if any(
                fnmatch.fnmatchcase(unicodedata.normalize("NFC", member.name), form) or member.name == form
                for form in _forms(pattern)
            ):
                yield member_address(root, member.name)
    elif "://" in root:
        yield from list_remote(f"{root.rstrip('/')}/{pattern}")
    else:
        for form in _forms(pattern):
            literal = os.path.join(root, form)
            paths = (
                [literal]
                if os.path.isfile(literal)
                else glob.glob(os.path.join(glob.escape(root), form), recursive=True)
            )
            paths = [path for path in paths if os.path.isfile(path)]
            for path in paths:
                _refuse_link(settings, path)
            yield from paths
            if paths:
                return


def _refuse_link(settings: AnnotatedConfig, path: str) -> None:
    try:
        _check_inside(settings, path, is_link=True)
    except OutsideRootError as error:
        raise UserError(str(error)) from error


def _whats_there(root: str, pattern: str) -> str:
    """What the root has with the ending of the pattern."""
    ending = os.path.splitext(pattern)[1]
    if "://" in root or not os.path.isdir(root):
        return (
            "set data.annotations or data.root"
            if "://" in root or os.path.isfile(root)
            else "there is no such folder: set data.root"
        )
    names = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
    alike = [name for name in names if name.endswith(ending)] or names
    return (
        f"there are {', '.join(alike[:_MAX_NAMED])}: set data.annotations"
        if alike
        else "the folder is empty: set data.root"
    )
