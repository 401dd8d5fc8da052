"""Cache of archive indices, in the process and, if a folder is set, on disk for later processes."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from vlmcap.data.arrays import load_arrays, save_arrays
from vlmcap.data.media.archives import ArchiveIndex, read_index
from vlmcap.data.media.storage import local_file, stat_file

_MAX_MEMBERS = 4_000_000  # of all indices that a process keeps, about 200 bytes each

_indices: dict[str, ArchiveIndex] = {}  # least recently used first
_folder: Path | None = None


def use_index_folder(folder: Path | None) -> None:
    """Lets this process and its forks keep the indices of archives in `folder`; None keeps them in memory only.

    This pays off for shards on object storage, whose headers cost a request for each member.
    """
    global _folder
    _folder = folder


def index_of(archive: str, kind: str) -> ArchiveIndex:
    """Returns the index of an archive.

    A local archive that has changed is read again; a remote one is assumed not to change while the process runs.

    Raises:
        MediaError: The archive cannot be read.
    """
    key = f"{kind}://{archive}"
    index = _indices.pop(key, None)
    # Asking a remote server for each access would take too long, so its archives are looked at once.
    if index is None or (local_file(archive) is not None and _version(archive) != index.version):
        index = _load(archive, kind, _version(archive))
    _indices[key] = index  # moves to the end, so that it is evicted last
    _evict()
    return index


def _version(archive: str) -> str:
    stat = stat_file(archive)
    return f"{stat.version}-{stat.size}"


def _evict() -> None:
    total = sum(map(len, list(_indices.values())))
    for key in list(_indices)[:-1]:  # the least recently used first, and never the index in use
        if total <= _MAX_MEMBERS:
            return
        dropped = _indices.pop(key, None)
        total -= len(dropped) if dropped is not None else 0


def _load(archive: str, kind: str, version: str) -> ArchiveIndex:
    if _folder is None:
        return read_index(archive, kind, version)
    name = hashlib.sha256("\0".join((archive, kind, version)).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    path = _folder / f"{name}.npz"
    saved = load_arrays(path)
    if saved is not None and saved.keys() == {"names", "spans"}:
        names = saved["names"].tobytes().decode("utf-8").split("\0") if len(saved["spans"]) else []
        return ArchiveIndex(kind, version, names, saved["spans"])
    index = read_index(archive, kind, version)
    with contextlib.suppress(OSError):  # the cache is optional, so a full disk must not stop the run
        save_arrays(path, names=np.frombuffer("\0".join(index.names).encode("utf-8"), np.uint8), spans=index.spans)
    return index
