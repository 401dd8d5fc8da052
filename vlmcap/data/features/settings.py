"""How a feature store is filled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FillSettings:
    """How a store is filled.

    Attributes:
        shard_bytes: A shard is closed when it has reached this size.
        flush_s: Seconds of encoding after which what there is becomes a shard, so that a kill costs no more.
        chunk_clips: Clips that a process claims at a time.
        stale_s: Seconds without a sign of life after which another machine's claim is taken over.
        poll_s: Seconds between looks at what others have done, when they hold all that is left.
    """

    shard_bytes: int = 256 * 2**20
    flush_s: float = 60.0
    chunk_clips: int = 256
    stale_s: float = 180.0
    poll_s: float = 2.0
