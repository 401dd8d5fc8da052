"""Resolution of the file names in annotations, below the data set's root and nowhere else."""

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

_HINT = "write it relative to data.root, or set data.allow_outside=true"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_MAX_NAMED_FILES = 12


class OutsideRootError(Exception):
    """A name in annotations leads to no file inside the root; the message is one sentence."""


def resolve_media(settings: MediaConfig, name: str) -> str:
    """Returns the address of a file that annotations name, below `root/media`, in a folder or inside an archive.

    The name is tried in NFC and in NFD. An archive counts as a folder of its name and also as the folder that contains
    it. A remote root is not asked whether the file exists.

    Raises:
        OutsideRootError: There is no such file, two archives contain it, or the name is an absolute path, contains
            `..`, is a URL, or goes through a link that leaves the root, unless `allow_outside` is set.
        UserError: `settings.media` leaves the root.
    """
    if settings.allow_outside and ("://" in name or os.path.isabs(name)):
        return name
    parts = _split_name(name, settings.allow_outside)
    try:
        media = os.path.splitext(settings.media)[0] if is_archive(settings.media) else settings.media
        folder = _split_name(media, settings.allow_outside, is_folder=True) if media else []
    except OutsideRootError as error:
        raise UserError(f"data.media: {error}") from error
    relative = "/".join([*folder, *parts])
    if "://" in settings.root and not is_archive(settings.root):
        if re.search(r"[%?#]", relative):  # a server may decode %2e%2e to ..
            raise OutsideRootError(f"{name!r} contains %, ? or #, which have a meaning in a URL; rename the file")
        return f"{settings.root.rstrip('/')}/{relative}"
    address = _local_file(settings, relative) or _archive_member(settings, relative, "/".join(parts))
    if address is None:
        # The file may be in an archive that cannot be read.
        broken = [archive.error for archive in _archives(settings) if archive.error]
        raise OutsideRootError(
            f"there is no file {relative!r} below {settings.root}" + (f"; {broken[0]}" if broken else "")
        )
    return address


def annotation_files(settings: AnnotatedConfig) -> list[str]:
    """Returns the sorted addresses of the files that `data.annotations` names.

    Its value is a file or a pattern with `*`, `?` and `**` below the root.

    Raises:
        UserError: There are none, or they are outside the root.
    """
    pattern, root = settings.annotations, settings.root
    if not pattern:
        raise UserError(
            "data.annotations has no value; set it to the file with the captions, or to a pattern, below data.root"
        )
    if not settings.allow_outside:
        try:
            pattern = "/".join(_split_name(pattern, False))
        except OutsideRootError as error:
            raise UserError(f"data.annotations: {error}") from error
    try:
        addresses = sorted(_matching(settings, pattern))
    except MediaError as error:
        raise UserError(f"data.root={root}: {error}") from error
    if not addresses:
        raise UserError(
            f"data.annotations={settings.annotations} is not a file below data.root={root}; "
            f"{_describe_root(root, pattern)}"
        )
    return addresses


def real_address(address: str) -> str:
    """Returns the address with all links resolved, so that a file has one address however it is spelled.

    Remote addresses are returned unchanged.
    """
    parts = parse_address(address)
    path = local_file(parts.file)
    if path is None:
        return address
    folder, name = os.path.split(path)
    # Links to files are rare, and resolving every folder of every file takes time.
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(_real_folder(folder), name)
    return f"{parts.kind}://{parts.member}::{real}" if parts.kind else real


def relative_address(address: str, root: str) -> str:
    """Returns the address relative to the root, in NFC, which does not depend on where the data set is stored."""
    member, separator, location = address.rpartition("::")
    below = location.removeprefix(root.rstrip("/")).lstrip("/")
    return unicodedata.normalize("NFC", f"{member}{separator}{below}")


def _split_name(name: str, allow_outside: bool, *, is_folder: bool = False) -> list[str]:
    """Splits a relative path into its components; raises `OutsideRootError` for other names."""
    if "\0" in name or any("\ud800" <= char <= "\udfff" for char in name):
        raise OutsideRootError(f"{name!r} is not a file name")
    if is_folder and allow_outside:
        return name.rstrip("/").split("/")
    if "://" in name or "::" in name:
        raise OutsideRootError(f"{name!r} is an address and not a file below data.root; {_HINT}")
    if name.startswith(("/", "\\")) or _DRIVE.match(name):
        raise OutsideRootError(f"{name!r} is an absolute path; {_HINT}")
    # Annotations written on Windows have backslashes.
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts and not allow_outside:
        raise OutsideRootError(f"{name!r} contains '..'; {_HINT}")
    if not parts and not is_folder:
        raise OutsideRootError(f"{name!r} is not a file name")
    return parts


def _unicode_forms(name: str) -> Iterator[str]:
    # Hangul in file names is composed on some systems and decomposed on others.
    yield from dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)))


def _local_file(settings: AnnotatedConfig, relative: str) -> str | None:
    for form in _unicode_forms(relative):
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
    # A link is followed to its end; for plain files resolving the folder is enough and is cached.
    real = os.path.realpath(path) if is_link else os.path.join(_real_folder(folder), name)
    if not is_below(real, _real_folder(settings.root)):
        raise OutsideRootError(
            f"{path!r} is a link out of data.root; copy the file there, or set data.allow_outside=true"
        )


def _real_folder(folder: str) -> str:
    return _real(os.path.abspath(folder))


@lru_cache(maxsize=100_000)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _archive_member(settings: AnnotatedConfig, relative: str, name: str) -> str | None:
    """Returns the address of the archive member below the root that has this path, or this name."""
    archives = [archive for archive in _archives(settings) if not archive.error]
    below = [
        (a, relative.removeprefix(a.folder).lstrip("/"))
        for a in archives
        if relative.startswith(f"{a.folder}/" if a.folder else "")
    ]
    # A member may have its path below the archive's folder, its path below the root, or its name in the annotations.
    for candidates in (below, [(a, relative) for a in archives], [(a, name) for a in archives]):
        addresses = [address for archive, member in candidates if (address := _find_in_archive(archive.file, member))]
        if len(addresses) > 1:
            raise OutsideRootError(
                f"{addresses[0]} and {addresses[1]} have the same name; set data.media to the archive to use"
            )
        if addresses:
            return addresses[0]
    return None


def _archives(settings: AnnotatedConfig) -> tuple[Archive, ...]:
    return archives_below(settings.root, "follow" if settings.allow_outside else "skip")


def _find_in_archive(archive: str, member: str) -> str | None:
    for form in _unicode_forms(member):
        address = member_address(archive, form)
        try:
            stat_media(address)
        except MediaError:
            continue
        return address
    return None


def _matching(settings: AnnotatedConfig, pattern: str) -> Iterator[str]:
    root = settings.root
    # Names of Korean files are stored in two Unicode forms (NFC on Linux and Windows, NFD on macOS), so both are tried.
    if is_archive(root) and not os.path.isdir(root):
        for member in list_members(root):
            if any(
                fnmatch.fnmatchcase(unicodedata.normalize("NFC", member.name), form) or member.name == form
                for form in _unicode_forms(pattern)
            ):
                yield member_address(root, member.name)
    elif "://" in root:
        yield from list_remote(f"{root.rstrip('/')}/{pattern}")
    else:
        for form in _unicode_forms(pattern):
            # A name with brackets or stars that exists as it is written is that file, not a pattern.
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


def _describe_root(root: str, pattern: str) -> str:
    """Describes which files the root has with the ending of the pattern, and what to set."""
    ending = os.path.splitext(pattern)[1]
    if "://" in root or not os.path.isdir(root):
        if "://" in root or os.path.isfile(root):
            return "set data.annotations or data.root"
        return "that folder does not exist, so set data.root"
    names = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
    alike = [name for name in names if name.endswith(ending)] or names
    if not alike:
        return "that folder is empty, so set data.root"
    return f"that folder contains {', '.join(alike[:_MAX_NAMED_FILES])}, so set data.annotations"
