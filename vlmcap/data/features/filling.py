"""Parallel encoding of a list of clips: each process claims free chunks until all features are stored."""

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

_MESSAGE_INTERVAL_S = 30.0

Batches = Callable[[NDArray[np.int64]], Iterable[list[Sample | Skipped]]]
"""Function from positions of clips to lists of their samples with frames, in the same order, each once."""


@dataclass(frozen=True, slots=True)
class FillSettings:
    """Settings for filling a store.

    Attributes:
        shard_bytes: Size at which a shard is closed.
        flush_s: Seconds of encoding after which a shard is written, so that a kill costs no more.
        chunk_clips: Number of clips that a process claims at a time.
        stale_s: Seconds without a sign of life after which another machine's claim is taken over.
        poll_s: Seconds between checks of other processes' progress while they hold all that is left.
        patience_s: Seconds without progress of other processes after which their clips are encoded here too, since they
            may hang.
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
    """Encodes all missing clips together with the other processes that call this, and returns when all are stored.

    A process may be killed at any time: what it wrote stays, and the others or the next call do the rest.

    Args:
        store: Store to fill.
        hashes: S32 (N,) content hashes of all clips.
        batches: Function from positions in `hashes` to lists of samples, see `Batches`.
        encode: Stacked frames and the clips' sizes, if they have their own -> (B, F, P, Dv), floating, on any device;
            or a list of B tensors (F, P, Dv) without padding.
        progress: Callback `(done, N)` on clips, those of other processes included.
        on_wait: Callback that gets a message now and then while other processes hold all that is left.
        retry_lost: Whether to retry clips whose decoder was lost; broken clips are not retried.
        max_bytes: Limit of all stores in the same folder; the least recently used ones are evicted to keep it.
        settings: Settings for shards and shared work.

    Raises:
        UserError: The disk or `max_bytes` is too small, no clip is readable, features are not finite or overflow the
            dtype, or their shape varies.
    """
    _Filling(store, hashes, encode, progress, on_wait, retry_lost, max_bytes, settings or FillSettings()).run(batches)


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Positions of neighbouring clips.

    The name is a hash of their contents, so that processes that start at different times name the same chunk alike.
    """

    name: str
    positions: NDArray[np.int64]


class _Filling:
    """One call of `fill_store`, which documents the arguments."""

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
        self._left: dict[str, int] = {}  # number of clips of each chunk that still need work
        self._done: list[str] = []  # encoded chunks whose last features may not be in a shard yet
        self._has_measured = False
        self._last_message_s = -math.inf

    def run(self, batches: Batches) -> None:
        """Fills the store and returns when all features are there."""
        self.store.refresh()
        chunks = [chunk for chunk in self._chunks() if self._is_incomplete(chunk)]
        self._report()
        remove_leftovers(self.store.folder)
        remove_free_claims(self.store.folder / CLAIMS)
        if chunks:
            self._process_chunks(chunks, batches)
        self.store.save_index()
        self._check_any_stored()

    def _process_chunks(self, chunks: list[_Chunk], batches: Batches) -> None:
        self.store.make_folder()
        self._writer.shape = self._known_shape()
        left, since = math.inf, time.monotonic()  # clips held by others, and when their number last fell
        with self._claims:
            while chunks:
                chunk = next((chunk for chunk in chunks if self._claims.take(chunk.name)), None)
                if chunk is not None:
                    self._encode_chunk(chunk, batches)
                    chunks.remove(chunk)
                    self._done.append(chunk.name)
                    since = time.monotonic()
                elif time.monotonic() - since > self.settings.patience_s:
                    self._encode_chunk(chunks.pop(0), batches)  # without a claim: at worst two processes encode it
                else:  # others will finish or abandon their chunks
                    self._flush()
                    self._wait()
                    self.store.refresh()
                    chunks = [chunk for chunk in chunks if self._is_incomplete(chunk)]
                    self._report()
                    if sum(self._left.values()) < left:
                        left, since = sum(self._left.values()), time.monotonic()
            self._flush()

    def _chunks(self) -> list[_Chunk]:
        """Splits all clips, not only the missing ones, so that processes that start at other times get equal chunks."""
        # First position of each distinct content, in the order of the clips.
        positions = np.sort(np.unique(self.hashes, return_index=True)[1])
        size = self.settings.chunk_clips
        slices = [positions[start : start + size].astype(np.int64) for start in range(0, len(positions), size)]
        return [_Chunk(hashlib.sha256(self.hashes[part].tobytes()).hexdigest()[:24], part) for part in slices]

    def _missing(self, chunk: _Chunk) -> NDArray[np.int64]:
        positions: NDArray[np.int64] = chunk.positions[
            self.store.missing(self.hashes[chunk.positions], retry_lost=self.retry_lost)
        ]
        return positions

    def _is_incomplete(self, chunk: _Chunk) -> bool:
        self._left[chunk.name] = len(self._missing(chunk))
        return self._left[chunk.name] > 0

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(len(self.hashes) - sum(self._left.values()), len(self.hashes))

    def _encode_chunk(self, chunk: _Chunk, batches: Batches) -> None:
        """Encodes the missing clips of a chunk, and writes shards when they are due."""
        self.store.refresh()  # another process may have encoded it between the last check and the claim
        positions, start, writer = self._missing(chunk), 0, self._writer
        self._left[chunk.name] = len(positions)
        try:
            for batch in batches(positions) if len(positions) else ():
                taken = positions[start : start + len(batch)]
                start += len(batch)
                sizes = writer.add(batch, [bytes(content) for content in self.hashes[taken]], self.encode)
                # The first clips show how large the store will be, long before the disk is full.
                if sizes and not self._has_measured:
                    self._check_room(sum(self._left.values()) * sum(sizes) // len(sizes))
                    self._has_measured = True
                self._left[chunk.name] -= len(batch)
                self._report()
                is_late = writer.since is not None and time.monotonic() - writer.since >= self.settings.flush_s
                if is_late or writer.num_bytes >= self.settings.shard_bytes:
                    self._flush()
        except BaseException:
            if self._has_measured:
                with contextlib.suppress(Exception):  # if this can still be written, the next call continues from here
                    writer.flush()
            raise
        assert start == len(positions), f"the batches held {start} of {len(positions)} clips"
        self._left[chunk.name] = 0

    def _flush(self) -> None:
        """Writes a shard, then releases its chunks: other processes see the features only when they are written."""
        self._writer.flush()
        self._claims.release(self._done)
        self._done.clear()

    def _wait(self) -> None:
        """Sleeps for a poll interval, with a message now and then."""
        if self.on_wait is not None and time.monotonic() - self._last_message_s >= _MESSAGE_INTERVAL_S:
            self.on_wait(
                f"waiting for {sum(self._left.values())} clips that {self._owner()} encodes into {self.store.folder}"
            )
            self._last_message_s = time.monotonic()
        time.sleep(self.settings.poll_s)

    def _owner(self) -> str:
        """Describes the process that holds the first of the remaining chunks."""
        described = (self._claims.owner(name)[0].partition("\n")[2] for name, left in self._left.items() if left)
        return next(filter(None, described), "another process")

    def _known_shape(self) -> tuple[int, int] | None:
        """Returns (F, P) of a stored clip, which all clips without a size of their own must share."""
        layouts = self.store.layouts()  # columns: shard, F, P, Dv, and the size in patches or zeros
        without_size = layouts[layouts[:, 4] == 0]
        return (int(without_size[0, 1]), int(without_size[0, 2])) if len(without_size) else None

    def _check_room(self, num_bytes: int) -> None:
        """Checks early that there is room for all missing clips, estimated from the first ones."""
        free = shutil.disk_usage(self.store.folder).free
        hint = "set cache.dtype=int8, cache.pooled=true or cache.enabled=false, or lower data.num_frames"
        if self.max_bytes is not None:
            needed = self.store.num_bytes + num_bytes
            if needed > self.max_bytes:
                raise UserError(
                    f"the features take {needed / 2**30:.2f} GiB, but cache.max_gib allows "
                    f"{self.max_bytes / 2**30:.2f}; raise it, or {hint}"
                )
            self._make_room(num_bytes)
            # Making room may have freed some.
            free = shutil.disk_usage(self.store.folder).free
        if num_bytes > free:
            raise UserError(
                f"the feature store needs {num_bytes / 1e9:.1f} GB more in {self.store.root}, where {free / 1e9:.1f} "
                f"GB are free; free some space, or {hint}"
            )

    def _make_room(self, num_bytes: int) -> None:
        if self.max_bytes is not None:
            make_room(self.store.root, self.max_bytes, num_bytes, self.store.key)

    def _check_any_stored(self) -> None:
        """Raises if no clip could be stored; training would fail later with a less clear message."""
        if len(self.hashes) and not any(bytes(content) in self.store for content in self.hashes):
            reasons = (self.store.skipped(bytes(content)) for content in self.hashes)
            reason = next((reason for reason in reasons if reason), "their files cannot be opened")
            raise UserError(
                f"none of the {len(self.hashes)} clips can be encoded, because {reason}; check data.root and the files"
            )
