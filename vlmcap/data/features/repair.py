"""Repair of shards: damaged entries are found by their checksums, and the shard is written again without them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vlmcap.data.features.shards import (
    DAMAGED,
    SCALE,
    BrokenFileError,
    Shard,
    read_shard,
    tensors_checksum,
    write_shard,
)
from vlmcap.types import Clip, Skipped


def damaged_entries(path: Path) -> list[str]:
    """Returns the content hashes of the clips of a shard whose entries are damaged.

    Raises:
        BrokenFileError: Nothing in the shard can be read.
        OSError: The shard cannot be opened.
    """
    return _find_damage(path)[2]


def _find_damage(path: Path) -> tuple[Shard, dict[str, Tensor], list[str]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shard = read_shard(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BrokenFileError(str(error)) from error
    damaged = [
        entry.content
        for entry in shard.entries
        if tensors_checksum(entry.content, tensors, entry.grid_thw, entry.times_s) != entry.checksum
    ]
    return shard, tensors, damaged


def repair_shard(path: Path) -> bool:
    """Writes the valid entries of a shard to a new one that marks the damaged ones for a retry, and removes the old.

    Returns:
        Whether anything was damaged.

    Raises:
        BrokenFileError: Nothing in the shard can be read; it stays.
        OSError: The shard cannot be opened, or the new one cannot be written.
    """
    shard, tensors, damaged = _find_damage(path)
    if not damaged:
        return False
    valid = {name: tensor for name, tensor in tensors.items() if name.removesuffix(SCALE) not in damaged}
    grids = {
        entry.content: entry.grid_thw
        for entry in shard.entries
        if entry.grid_thw is not None and entry.content in valid
    }
    skipped = {
        content: Skipped(Clip("", "", ()), reason, content not in shard.lost)
        for content, reason in shard.skipped.items()
    }
    # =|Not final, so that the next filling computes the features of these clips.
    skipped |= {content: Skipped(Clip("", "", ()), DAMAGED, is_final=False) for content in damaged}
    times_s = {entry.content: entry.times_s for entry in shard.entries if entry.times_s and entry.content in valid}
    # The new shard is complete before the damaged one goes.
    write_shard(path.parent, shard.dtype, valid, grids, skipped, shard.errors, times_s)
    path.unlink(missing_ok=True)
    return True
