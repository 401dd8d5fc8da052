"""One video in several splits, found by its content."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from vlmcap.data.features.content import UNREADABLE, content_hashes
from vlmcap.data.media import MediaError, parse_address, stat_media
from vlmcap.data.media.storage import local_file
from vlmcap.types import Clip


def describe_overlap(splits: Mapping[str, Sequence[Clip]], memo: Path) -> str | None:
    """One sentence on the videos that are in more than one split with the same content, or None where there are none.

    Contents are compared only where sizes are equal, so next to nothing is read. Of files on an object store, the
    addresses are compared.

    Args:
        splits: Split name to clips.
        memo: As `content_hashes` takes it.
    """
    looks = {split: [_look(clip) for clip in clips] for split, clips in splits.items()}
    first_split: dict[Hashable, str] = {}
    doubtful = {
        look for split, own in looks.items() for look in own if look and first_split.setdefault(look, split) != split
    }
    contents = {}
    for split, own in looks.items():
        chosen = [position for position, look in enumerate(own) if look in doubtful]
        contents[split] = _first_of_each(
            [splits[split][position] for position in chosen], [own[position] for position in chosen], memo
        )
    counts, first = [], ""
    for one, other in combinations(contents, 2):
        both = [content for content in contents[one] if content in contents[other]]
        if both:
            counts.append(f"{one} and {other} ({len(both)})")
            a, b = contents[one][both[0]], contents[other][both[0]]
            first = first or f"{one}/{a.id} ({a.video}) = {other}/{b.id} ({b.video})"
    if not counts:
        return None
    return f"the same videos are in {', '.join(counts)}, so scores will be too good: take them out of one of the splits; first {first}"


def _look(clip: Clip) -> tuple[Hashable, ...] | None:
    """What clips of one content have in common without a look at it: sizes, or addresses where sizes cost a request.

    None if unreadable.
    """
    files = clip.frames or (clip.video,)
    try:
        if any(local_file(parse_address(file).file) is None for file in files):
            return files
        return tuple(stat_media(file).size for file in files)
    except (MediaError, OSError):
        return None


def _first_of_each(
    clips: Sequence[Clip], looks: Sequence[tuple[Hashable, ...] | None], memo: Path
) -> dict[Hashable, Clip]:
    """Content to the first of the clips that have it."""
    is_remote = [look == (clip.frames or (clip.video,)) for clip, look in zip(clips, looks, strict=True)]
    hashes = iter(
        content_hashes([clip for clip, skip in zip(clips, is_remote, strict=True) if not skip], memo).tolist()
    )
    found: dict[Hashable, Clip] = {}
    for clip, look, is_address in zip(clips, looks, is_remote, strict=True):
        found.setdefault(look if is_address else next(hashes), clip)
    found.pop(UNREADABLE, None)
    return found
