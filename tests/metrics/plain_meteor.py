"""METEOR's alignment as one would write it to be read: the reference of the fast one."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple


class Alignment(NamedTuple):
    """Fewer is better in each of the first three, compared in this order.

    Bit i of `used` is set when hypothesis token i is matched.
    """

    misses: int
    chunks: int
    distance: int
    end: int
    used: int


def align(hypothesis: list[str], reference: list[str]) -> tuple[int, int]:
    """Matched hypothesis positions, as bits, and chunks; a beam of 40, ties going to the alignment found first."""
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for position, token in enumerate(hypothesis):
        positions[token].append(position)
    in_reference = Counter(reference)

    beam = [Alignment(misses=0, chunks=0, distance=0, end=-1, used=0)]
    for index, token in enumerate(reference):
        choices = positions.get(token, [])
        is_certain = in_reference[token] == 1 and len(choices) == 1
        extended: list[Alignment] = []
        for alignment in beam:
            extended.extend(extend(alignment, index, choices, is_certain=is_certain))
        extended.sort(key=lambda alignment: alignment[:3])
        beam = extended[:40]
    best = min(
        (extend(alignment, len(reference), [], is_certain=False)[0] for alignment in beam),
        key=lambda alignment: alignment[:3],
    )
    return best.used, best.chunks


def extend(alignment: Alignment, index: int, choices: list[int], *, is_certain: bool) -> list[Alignment]:
    misses, chunks, distance, end, used = alignment
    extended = []
    for position in choices:
        if used >> position & 1:
            continue
        # As in METEOR 1.5, an uncertain match adds its distance to the choices after it.
        own = abs(position - index) if is_certain else 0
        extended.append(
            Alignment(misses, chunks + (end not in (-1, position)), distance + own, position + 1, used | 1 << position)
        )
        distance += abs(position - index)
    if not is_certain:
        extended.append(Alignment(misses + 1, chunks + (end != -1), distance, -1, used))
    return extended
