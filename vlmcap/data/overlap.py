"""Search for videos that are in several splits, by their content."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from vlmcap.data.features.content_hash import UNREADABLE, content_hashes
from vlmcap.data.media import MediaError, parse_address, stat_media
from vlmcap.data.media.storage import local_file
from vlmcap.types import Clip


def describe_overlap(splits: Mapping[str, Sequence[Clip]], hash_file: Path) -> str | None:
    """Describes in one sentence the videos whose content is in more than one split; None if there are none.

    Contents are compared only where sizes are equal, so very little is read. Files in an object store are compared by
    their addresses.

    Args:
        splits: Split name to clips.
        hash_file: File of known hashes, as for `content_hashes`.
    """
    # 1. Find the sizes that occur in more than one split.
    keys = {split: [_cheap_key(clip) for clip in clips] for split, clips in splits.items()}
    first_split: dict[Hashable, str] = {}
    # Keys that a second split has too; a size alone proves nothing.
    pairs = ((split, key) for split, split_keys in keys.items() for key in split_keys if key)
    shared = {key for split, key in pairs if first_split.setdefault(key, split) != split}
    # 2. Hash the content of the clips with these sizes.
    contents = {}
    for split, split_keys in keys.items():
        chosen = [position for position, key in enumerate(split_keys) if key in shared]
        contents[split] = _first_clip_by_content(
            [splits[split][position] for position in chosen], [split_keys[position] for position in chosen], hash_file
        )
    # 3. Count the contents that each pair of splits has in common.
    counts, first = [], ""
    for one, other in combinations(contents, 2):
        both = [content for content in contents[one] if content in contents[other]]
        if both:
            counts.append(f"{one} and {other} ({len(both)})")
            a, b = contents[one][both[0]], contents[other][both[0]]
            first = first or f"{one}/{a.id} ({a.video}) = {other}/{b.id} ({b.video})"
    if not counts:
        return None
    return (
        f"the same videos are in {', '.join(counts)}, so scores will be too high; remove them from one of the splits, "
        f"the first is {first}"
    )


def _cheap_key(clip: Clip) -> tuple[Hashable, ...] | None:
    """Returns a key that clips of equal content share: file sizes, or addresses where a size costs a request.

    None if a file is unreadable.
    """
    files = clip.frames or (clip.video,)
    try:
        if any(local_file(parse_address(file).file) is None for file in files):
            return files
        return tuple(stat_media(file).size for file in files)
    except (MediaError, OSError):
        return None


def _first_clip_by_content(
    clips: Sequence[Clip], keys: Sequence[tuple[Hashable, ...] | None], hash_file: Path
) -> dict[Hashable, Clip]:
    """Maps each content to the first of the clips that have it."""
    is_remote = [key == (clip.frames or (clip.video,)) for clip, key in zip(clips, keys, strict=True)]
    hashes = iter(
        content_hashes([clip for clip, skip in zip(clips, is_remote, strict=True) if not skip], hash_file).tolist()
    )
    first_clip: dict[Hashable, Clip] = {}
    for clip, key, is_address in zip(clips, keys, is_remote, strict=True):
        first_clip.setdefault(key if is_address else next(hashes), clip)
    first_clip.pop(UNREADABLE, None)
    return first_clip
