"""Listing, removal and eviction of the feature stores in a folder."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmcap.data.features import index as indices
from vlmcap.data.features.leases import is_in_use, last_used
from vlmcap.data.features.precision import ErrorSums, StorageDeviation
from vlmcap.data.features.recipe import is_key
from vlmcap.data.features.shards import SUFFIX
from vlmcap.errors import UserError

_REMOVED = ".removed-"


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A store as shown in a list.

    Attributes:
        key: Name of its folder.
        recipe: Recipe of its features, from `recipe.json`.
        num_clips: Number of clips with features.
        num_bytes: Size on disk.
        last_used: Seconds since 1970.
        deviation: Deviation of the stored numbers, measured when they were written.
        is_in_use: Whether a living process has it open.
    """

    key: str
    recipe: dict[str, Any]
    num_clips: int
    num_bytes: int
    last_used: float
    deviation: StorageDeviation | None
    is_in_use: bool


def list_stores(root: Path) -> list[StoreInfo]:
    """Lists the stores under `root`, the most recently used first."""
    return sorted((_info(folder) for folder in store_folders(root)), key=lambda info: -info.last_used)


def remove_store(root: Path, key: str) -> int:
    """Removes a store and returns the number of bytes freed.

    Raises:
        UserError: There is no store of this name, or it is in use.
    """
    if root / key not in store_folders(root):
        raise UserError(f"there is no feature store '{key}' in {root}; run `vlmcap cache info` to list the stores")
    if _info(root / key).is_in_use:
        raise UserError(
            f"the feature store '{key}' in {root} is in use by a running program; wait until that has ended"
        )
    freed = _size(root / key)
    # Renamed first, so that no process sees a store that is half removed; `prune` removes what a kill leaves.
    aside = root / f"{_REMOVED}{secrets.token_hex(4)}"
    (root / key).rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
    return freed


def prune(root: Path, max_bytes: int, keep: Collection[str] = ()) -> int:
    """Frees space until all stores together take at most `max_bytes`, as far as possible; returns the bytes freed.

    Whole shards are removed, the oldest of the least recently used store first; the rest of a store remains usable and
    can be filled again.

    Args:
        root: Folder of all stores.
        max_bytes: Size that may remain.
        keep: Keys of stores to keep; stores that a living process has open are kept too.
    """
    for leftover in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    sizes = {folder: _size(folder) for folder in store_folders(root)}
    before = excess = sum(sizes.values()) - max_bytes
    # The least recently used first.
    for folder in sorted(sizes, key=last_used):
        if excess <= 0:
            break
        if folder.name not in keep and not is_in_use(folder):
            excess -= _evict(folder, excess)
    return before - excess


def make_room(root: Path, max_bytes: int, incoming: int, key: str) -> None:
    """Evicts shards until `incoming` more bytes fit under `max_bytes`.

    Args:
        root: Folder of all stores.
        max_bytes: Limit of all stores.
        incoming: Number of bytes about to be written.
        key: Store that they belong to, which loses nothing.

    Raises:
        UserError: They do not fit.
    """
    sizes = {folder: _size(folder) for folder in store_folders(root)}
    held = sum(size for folder, size in sizes.items() if folder.name == key or is_in_use(folder))
    if held + incoming > max_bytes:  # raised before anything is evicted in vain
        raise UserError(
            f"cache.max_gib allows {max_bytes / 2**30:.2f} GiB of features in {root}, where this run and others in "
            f"progress hold {held / 2**30:.2f} GiB and {incoming / 2**30:.2f} GiB are to be added; raise it, or wait "
            "for the other runs"
        )
    if sum(sizes.values()) + incoming > max_bytes:
        prune(root, max_bytes - incoming, keep=(key,))


def store_folders(root: Path) -> list[Path]:
    """Returns the sorted folders of the stores under `root`."""
    try:
        return [
            path for path in sorted(root.iterdir()) if is_key(path.name) and path.is_dir() and not path.is_symlink()
        ]
    except OSError:
        return []


def shards_of(folder: Path) -> list[Path]:
    """Returns the shards of a store, the oldest first."""
    return sorted(path for path in folder.glob(f"[!.]*{SUFFIX}") if path.name != indices.FILE)


def _info(folder: Path) -> StoreInfo:
    index = indices.update(indices.load(folder), folder, {})
    sums = ErrorSums()
    for file in index.files:
        sums.add(file.errors)
    try:
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recipe = {}
    plain = recipe if isinstance(recipe, dict) else {}
    return StoreInfo(
        folder.name, plain, len(index.hashes), _size(folder), last_used(folder), sums.deviation, is_in_use(folder)
    )


def _size(folder: Path) -> int:
    """Returns the total size of a store's files in bytes."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _evict(folder: Path, num_bytes: int) -> int:
    """Evicts about `num_bytes` of a store, or all of it if no shard is left; returns the bytes freed."""
    freed, shards = 0, shards_of(folder)
    # Shards are sorted by their time, so the oldest features go first.
    while shards and freed < num_bytes:
        with contextlib.suppress(FileNotFoundError):  # another process evicts at the same time
            size = shards[0].stat().st_size
            shards.pop(0).unlink()
            freed += size
    if shards:
        return freed
    with contextlib.suppress(UserError):
        freed += remove_store(folder.parent, folder.name)
    return freed
