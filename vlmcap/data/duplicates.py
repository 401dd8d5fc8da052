"""Search for clips that look alike: copies, re-encodings, and pieces of one scene that fell into two splits.

The hash of a picture is its gradient at 9 x 8 grey pixels (dHash): 64 bits, few of which change with scaling,
compression and a little noise. The library imagehash has this hash too, but takes one PIL image at a time, requires
scipy and PyWavelets, and cannot search among many clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NUM_HASHED_FRAMES = 3
# Of 192 bits. Two hashes that differ in so few agree in one of their twelve bands of 16 bits, so no pair is missed.
MAX_DISTANCE = 11
_STRIP_SIZE = 2048  # clips compared with each other at a time; a larger group, such as black clips, is split
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def picture_hash(frames: Tensor) -> NDArray[np.uint64]:
    """Returns one hash per frame, uint8 (F, 3, H, W) -> uint64 (F,)."""
    grey = (frames.float() * torch.tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)  # (F, 1, H, W)
    # One column more than needed, as each bit compares two neighbours.
    small = F.adaptive_avg_pool2d(grey, (8, 9))  # (F, 1, 8, 9)
    rises = (small[..., 1:] > small[..., :-1]).flatten(1).numpy()  # (F, 1, 8, 8) -> (F, 64)
    packed = np.packbits(rises, axis=1, bitorder="little")  # (F, 64) bits -> (F, 8) bytes
    return np.ascontiguousarray(packed).view("<u8").reshape(-1).astype(np.uint64)


def look_alikes(hashes: NDArray[np.uint64], max_distance: int = MAX_DISTANCE) -> list[list[int]]:
    """Groups clips that are near each other, directly or through other clips.

    Args:
        hashes: uint64 (N, 3), the hashes of three frames of each clip.
        max_distance: Number of bits, of 192, in which two clips may differ; at most 11.

    Returns:
        Groups of clip indices, ascending within a group; groups are ordered by their first index.

    Raises:
        ValueError: `hashes` has another shape, or `max_distance` is out of its range.
    """
    if hashes.ndim != 2 or hashes.shape[1] != NUM_HASHED_FRAMES or not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(
            f"hashes must be (N, 3) and max_distance 0 to {MAX_DISTANCE}, not {hashes.shape} and {max_distance}"
        )
    # Equal hashes are compared as one: a thousand black clips have a single distinct hash.
    distinct, inverse = np.unique(hashes, axis=0, return_inverse=True)
    # Union-find: `parent` leads from each hash to the root of its group.
    parent = np.arange(len(distinct))
    for first, second in _near_pairs(distinct, max_distance):
        low, high = sorted((_root(parent, first), _root(parent, second)))
        parent[high] = low
    roots = np.array([_root(parent, index) for index in range(len(distinct))], dtype=np.int64)[inverse.reshape(-1)]
    groups: dict[int, list[int]] = {}
    for clip, root in enumerate(roots.tolist()):
        groups.setdefault(root, []).append(clip)
    return sorted(group for group in groups.values() if len(group) > 1)


def _near_pairs(hashes: NDArray[np.uint64], max_distance: int) -> Iterator[tuple[int, int]]:
    """Yields the pairs of indices whose hashes are near, several times if they agree in several bands."""
    bands = np.ascontiguousarray(hashes).view(np.uint16).reshape(len(hashes), -1)  # (N, 3) uint64 -> (N, 12) uint16
    for band in range(bands.shape[1]):
        # Sorting brings equal bands together; only clips within such a run are compared.
        order = np.argsort(bands[:, band], kind="stable")
        values = bands[order, band]
        # Cut where the band's value changes.
        for group in np.split(order, np.flatnonzero(np.diff(values)) + 1):
            if len(group) > 1:
                yield from _compare(hashes, group, max_distance)


def _compare(hashes: NDArray[np.uint64], group: NDArray[np.int64], max_distance: int) -> Iterable[tuple[int, int]]:
    for start in range(0, len(group), _STRIP_SIZE):
        strip = group[start : start + _STRIP_SIZE]
        for other_start in range(start, len(group), _STRIP_SIZE):
            other = group[other_start : other_start + _STRIP_SIZE]
            # (strip, 1, 3) ^ (1, other, 3): the number of bits that differ
            distance = np.bitwise_count(hashes[strip][:, None] ^ hashes[other][None]).sum(-1)  # (strip, other)
            for i, j in np.argwhere(distance <= max_distance):
                # Each pair once, and no clip with itself.
                if strip[i] < other[j]:
                    yield int(strip[i]), int(other[j])


def _root(parent: NDArray[np.int64], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]  # halves the path for later calls
        index = int(parent[index])
    return index
