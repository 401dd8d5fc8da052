"""Verification of all stores in a folder against their checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmcap.data.features import index as indices
from vlmcap.data.features.eviction import shards_of, store_folders
from vlmcap.data.features.repair import damaged_entries, repair_shard
from vlmcap.data.features.shards import BrokenFileError


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged file of a store.

    Attributes:
        path: The file.
        contents: Content hashes of the clips whose entries are damaged; empty if nothing in the file can be read.
        reason: Description of the damage.
        is_removed: Whether the damaged data has been removed, so that it will be created again.
    """

    path: Path
    contents: tuple[str, ...]
    reason: str
    is_removed: bool


def verify_stores(root: Path, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """Finds and removes the damaged entries and files of all stores under `root`; runs create them again.

    Programs that have a store open can continue: they keep their open files and find entries that have moved.

    Args:
        root: Folder of all stores.
        progress: Callback `(done, total)` on shards.
    """
    folders = store_folders(root)
    shards = [path for folder in folders for path in shards_of(folder)]
    damages: list[Damage] = []
    for number, path in enumerate(shards, 1):
        damages += _verify_shard(path)
        if progress is not None:
            progress(number, len(shards))
    for folder in folders:
        path = folder / indices.FILE
        if path.is_file() and not indices.is_intact(folder):
            reason = "it is not a complete index, or belongs to other shards"
            damages.append(Damage(path, (), reason, _is_done(path.unlink)))
    return damages


def _verify_shard(path: Path) -> Iterator[Damage]:
    try:
        damaged = damaged_entries(path)
    except FileNotFoundError:  # evicted since the folder was listed
        return
    except (BrokenFileError, OSError) as error:
        yield Damage(path, (), str(error), _is_done(path.unlink))
        return
    if damaged:
        reason = f"the features of {len(damaged)} clips differ from those that were written"
        yield Damage(path, tuple(damaged), reason, _is_done(lambda: repair_shard(path)))


def _is_done(change: Callable[[], object]) -> bool:
    try:
        change()
    except FileNotFoundError:
        return True
    except (OSError, BrokenFileError):
        return False
    return True
