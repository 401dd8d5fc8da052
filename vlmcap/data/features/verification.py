"""All that is in the stores of a folder, read and compared with its checksums."""

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
    """What is wrong with a file of a store.

    Attributes:
        path: The file.
        contents: Content hashes of the clips whose entries are damaged; empty where nothing of the file can be read.
        reason: In words.
        is_removed: Whether what is damaged has gone, so that it is made again.
    """

    path: Path
    contents: tuple[str, ...]
    reason: str
    is_removed: bool


def verify_stores(root: Path, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """What is damaged in all stores under `root`.

    Entries and files that are damaged are removed, and runs make them again.

    Programs that have a store open may go on: they keep what they have open, and find again what has moved.

    Args:
        root: Folder of all stores.
        progress: Called with (shards done, all shards).
    """
    folders = store_folders(root)
    shards = [path for folder in folders for path in shards_of(folder)]
    found: list[Damage] = []
    for number, path in enumerate(shards, 1):
        found += _verify_shard(path)
        if progress is not None:
            progress(number, len(shards))
    for folder in folders:
        path = folder / indices.FILE
        if path.is_file() and not indices.is_pretrained_vlm(folder):
            found.append(Damage(path, (), "it is no whole index, or that of other shards", _is_done(path.unlink)))
    return found


def _verify_shard(path: Path) -> Iterator[Damage]:
    try:
        damaged = damaged_entries(path)
    except FileNotFoundError:  # evicted since the folder was listed
        return
    except (BrokenFileError, OSError) as error:
        yield Damage(path, (), str(error), _is_done(path.unlink))
        return
    if damaged:
        reason = f"the features of {len(damaged)} clips are not those that were written"
        yield Damage(path, tuple(damaged), reason, _is_done(lambda: repair_shard(path)))


def _is_done(change: Callable[[], object]) -> bool:
    try:
        change()
    except FileNotFoundError:
        return True
    except (OSError, BrokenFileError):
        return False
    return True
