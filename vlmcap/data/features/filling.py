"""Many processes encode one list of clips: each takes chunks that nobody has, until all features are there."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmcap.data.features.eviction import make_room
from vlmcap.data.features.shards import Encode, ShardWriter
from vlmcap.data.features.store import FeatureStore
from vlmcap.errors import UserError
from vlmcap.files import remove_leftovers
from vlmcap.locks import CLAIMS, Claims, remove_free_claims
from vlmcap.types import Sample, Skipped

_SAY_S = 30.0

Batches = Callable[[NDArray[np.int64]], Iterable[list[Sample | Skipped]]]
"""From positions of clips to lists of their samples with frames, in the same order, each once."""


@dataclass(frozen=True, slots=True)
class FillSettings:
    """How a store is filled.

    Attributes:
        shard_bytes: A shard is closed when it has reached this size.
        flush_s: Seconds of encoding after which what there is becomes a shard, so that a kill costs no more.
        chunk_clips: Clips that a process claims at a time.
        stale_s: Seconds without a sign of life after which another machine's claim is taken over.
        poll_s: Seconds between looks at what others have done, when they hold all that is left.
        patience_s: Seconds without any new features of theirs after which their clips are encoded here, too: they may
            hang.
    """

    shard_bytes: int = 256 * 2**20
    flush_s: float = 60.0
    chunk_clips: int = 256
    stale_s: float = 180.0
    poll_s: float = 2.0
    patience_s: float = 900.0


def fill_store(
    store: FeatureStore,
    hashes: NDArray[np.bytes_],
    batches: Batches,
    encode: Encode,
    *,
    progress: Callable[[int, int], None] | None = None,
    on_wait: Callable[[str], None] | None = None,
    retry_lost: bool = False,
    max_bytes: int | None = None,
    settings: FillSettings | None = None,
) -> None:
    """Encode what is missing, together with all other processes that call this now; returns when everything is there.

    A process may be killed at any time: what it wrote stays, and the rest is done by the others or by the next call.

    Args:
        store: The store to fill.
        hashes: S32 (N,), the content hashes of all clips.
        batches: From positions in `hashes` to lists of samples, as `Batches` says.
        encode: Stacked frames and the clips' sizes, if they have their own -> (B, F, P, Dv), floating, on any device;
            or a list of B tensors (F, P, Dv) without padding.
        progress: Called with (clips done, N); those of other processes count.
        on_wait: Called with a sentence now and then, while other processes hold all that is left.
        retry_lost: Try clips again whose decoder was lost, not those that are broken.
        max_bytes: Limit of all stores in the folder of this one; the longest unused ones are evicted for it.
        settings: How shards are cut and work is shared.

    Raises:
        UserError: The disk or `max_bytes` is too small, no clip is readable, features are not finite or overflow the
            dtype, or their shape varies.
    """
    _Filling(store, hashes, encode, progress, on_wait, retry_lost, max_bytes, settings or FillSettings()).run(batches)


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Positions of neighbouring clips, named by their contents, so that processes that start at different times mean the same."""

    name: str
    positions: NDArray[np.int64]


class _Filling:
    """One call of `fill_store`, which explains the arguments."""

    def __init__(
        self,
        store: FeatureStore,
        hashes: NDArray[np.bytes_],
        encode: Encode,
        progress: Callable[[int, int], None] | None,
        on_wait: Callable[[str], None] | None,
        retry_lost: bool,
        max_bytes: int | None,
        settings: FillSettings,
    ) -> None:
        self.store, self.hashes, self.encode = store, hashes, encode
        self.progress, self.on_wait = progress, on_wait
        self.retry_lost, self.max_bytes, self.settings = retry_lost, max_bytes, settings
        self._writer = ShardWriter(store.folder, store.recipe, self._make_room)
        self._claims = Claims(store.folder / CLAIMS, settings.stale_s)
        self._left: dict[str, int] = {}  # clips of each chunk that still need work
        self._done: list[str] = []  # chunks whose last features may not be in a shard yet
        self._has_measured = False
        self._said = -math.inf

    def run(self, batches: Batches) -> None:
        """Returns when everything is there."""
        self.store.refresh()
        chunks = [chunk for chunk in self._chunks() if self._is_open(chunk)]
        self._report()
        remove_leftovers(self.store.folder)
        remove_free_claims(self.store.folder / CLAIMS)
        if chunks:
            self._share(chunks, batches)
        self.store.save_index()
        self._require_any()

    def _share(self, chunks: list[_Chunk], batches: Batches) -> None:
        self.store.make_folder()
        self._writer.shape = self._known_shape()
        left, since = math.inf, time.monotonic()  # clips that others hold, and when they last became fewer
        with self._claims:
            while chunks:
                chunk = next((chunk for chunk in chunks if self._claims.take(chunk.name)), None)
                if chunk is not None:
                    self._work(chunk, batches)
                    chunks.remove(chunk)
                    self._done.append(chunk.name)
                    since = time.monotonic()
                elif time.monotonic() - since > self.settings.patience_s:
                    self._work(chunks.pop(0), batches)  # without a claim: at worst two processes encode it
                else:  # what others work on, they finish or leave
                    self._flush()
                    self._wait()
                    self.store.refresh()
                    chunks = [chunk for chunk in chunks if self._is_open(chunk)]
                    self._report()
                    if sum(self._left.values()) < left:
                        left, since = sum(self._left.values()), time.monotonic()
            self._flush()

    def _chunks(self) -> list[_Chunk]:
        """All clips, not only the missing ones: then processes that start at different times cut alike."""
        positions = np.sort(np.unique(self.hashes, return_index=True)[1])
        size = self.settings.chunk_clips
        parts = [positions[start : start + size].astype(np.int64) for start in range(0, len(positions), size)]
        return [_Chunk(hashlib.sha256(self.hashes[part].tobytes()).hexdigest()[:24], part) for part in parts]

    def _missing(self, chunk: _Chunk) -> NDArray[np.int64]:
        found: NDArray[np.int64] = chunk.positions[
            self.store.missing(self.hashes[chunk.positions], retry_lost=self.retry_lost)
        ]
        return found

    def _is_open(self, chunk: _Chunk) -> bool:
        self._left[chunk.name] = len(self._missing(chunk))
        return self._left[chunk.name] > 0

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(len(self.hashes) - sum(self._left.values()), len(self.hashes))

    def _work(self, chunk: _Chunk, batches: Batches) -> None:
        """Encode what a chunk lacks; shards are written as they become due."""
        self.store.refresh()  # it may have been done between our last look and our claim
        positions, start, writer = self._missing(chunk), 0, self._writer
        self._left[chunk.name] = len(positions)
        try:
            for batch in batches(positions) if len(positions) else ():
                taken = positions[start : start + len(batch)]
                start += len(batch)
                sizes = writer.add(batch, [bytes(content) for content in self.hashes[taken]], self.encode)
                if sizes and not self._has_measured:
                    self._require_room(sum(self._left.values()) * sum(sizes) // len(sizes))
                    self._has_measured = True
                self._left[chunk.name] -= len(batch)
                self._report()
                is_late = writer.since is not None and time.monotonic() - writer.since >= self.settings.flush_s
                if is_late or writer.num_bytes >= self.settings.shard_bytes:
                    self._flush()
        except BaseException:
            if self._has_measured:
                with contextlib.suppress(Exception):  # the next call goes on from here, if this one can still write
                    writer.flush()
            raise
        assert start == len(positions), f"the batches held {start} of {len(positions)} clips"
        self._left[chunk.name] = 0

    def _flush(self) -> None:
        """Write what there is; only then are the chunks in it given back, as nobody else sees their features before."""
        self._writer.flush()
        self._claims.release(self._done)
        self._done.clear()

    def _wait(self) -> None:
        """Sleep a little, with a word now and then."""
        if self.on_wait is not None and time.monotonic() - self._said >= _SAY_S:
            self.on_wait(
                f"waiting for {sum(self._left.values())} clips that {self._owner()} encodes into {self.store.folder}"
            )
            self._said = time.monotonic()
        time.sleep(self.settings.poll_s)

    def _owner(self) -> str:
        """Who holds the first of the chunks that are left."""
        described = (self._claims.owner(name)[0].partition("\n")[2] for name, left in self._left.items() if left)
        return next(filter(None, described), "another process")

    def _known_shape(self) -> tuple[int, int] | None:
        """(F, P) of a clip that is there already, as all without a size of their own must agree."""
        places = self.store.places()
        own = places[places[:, 4] == 0]
        return (int(own[0, 1]), int(own[0, 2])) if len(own) else None

    def _require_room(self, num_bytes: int) -> None:
        """Before much work is done: room for all that is missing, judged by the first clips."""
        free = shutil.disk_usage(self.store.folder).free
        advice = "set cache.dtype=int8, cache.pooled=true or cache.enabled=false, lower data.num_frames"
        if self.max_bytes is not None:
            own = self.store.num_bytes + num_bytes
            if own > self.max_bytes:
                raise UserError(
                    f"the features take {own / 2**30:.2f} GiB, and cache.max_gib allows {self.max_bytes / 2**30:.2f}: "
                    f"raise it, or {advice}"
                )
            self._make_room(num_bytes)
            free = shutil.disk_usage(self.store.folder).free
        if num_bytes > free:
            raise UserError(
                f"the feature cache needs {num_bytes / 1e9:.1f} GB more in {self.store.root}, where {free / 1e9:.1f} "
                "GB are free: "
                f"{advice} or free the space"
            )

    def _make_room(self, num_bytes: int) -> None:
        if self.max_bytes is not None:
            make_room(self.store.root, self.max_bytes, num_bytes, self.store.key)

    def _require_any(self) -> None:
        """A store without a single clip would only fail later, and less clearly."""
        if len(self.hashes) and not any(bytes(content) in self.store for content in self.hashes):
            reasons = (self.store.skipped(bytes(content)) for content in self.hashes)
            reason = next((reason for reason in reasons if reason), "their files cannot be opened")
            raise UserError(f"none of {len(self.hashes)} clips can be cached: {reason}")
