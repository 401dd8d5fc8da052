"""Features on their way to a shard: checked, stored in the type of their recipe, and written when there are enough.

Legend: B clips of a batch, F frames, P patches a frame, Dv vision width.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vlmcap.data.features.precision import ErrorSums, dequantize, is_finite, measure, quantize, stored_type
from vlmcap.data.features.recipe import Recipe
from vlmcap.data.features.shards import SCALE, write_shard
from vlmcap.data.loading.collate import stack_padded
from vlmcap.errors import UserError
from vlmcap.types import GridTHW, Sample, Skipped

Encode = Callable[[Tensor, Sequence[GridTHW] | None], Tensor | Sequence[Tensor]]
"""Stacked frames, and the clips' sizes if they have their own, -> (B, F, P, Dv), or B tensors (F, P, Dv) without padding."""


@dataclass
class ShardWriter:
    """Collects features until they are a shard's worth.

    Attributes:
        folder: Of the shards.
        recipe: Says how numbers are stored.
        make_room: Called with bytes that are about to be written.
        shape: (F, P) that all clips without a size of their own have, None before the first.
        num_bytes: Collected.
        since: When the oldest of what is collected came, by the monotonic clock; None where there is nothing.
    """

    folder: Path
    recipe: Recipe
    make_room: Callable[[int], None]
    shape: tuple[int, int] | None = None
    num_bytes: int = 0
    since: float | None = None
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _grids: dict[str, GridTHW] = field(default_factory=dict)
    _skipped: dict[str, Skipped] = field(default_factory=dict)
    _errors: ErrorSums = field(default_factory=ErrorSums)

    def add(self, batch: list[Sample | Skipped], contents: Sequence[bytes], encode: Encode) -> list[int]:
        """Take in a batch; the bytes of each of its clips that has features.

        Args:
            batch: Samples with frames.
            contents: Content hash of each.
            encode: Gives the features.

        Raises:
            UserError: Features cannot be stored.
        """
        if batch and self.since is None:
            self.since = time.monotonic()
        named = list(zip(batch, (content.decode() for content in contents), strict=True))
        self._skipped |= {content: item for item, content in named if isinstance(item, Skipped)}
        samples = [(item, content) for item, content in named if isinstance(item, Sample)]
        frames = stack_padded([sample.frames for sample, _ in samples])
        if frames is None:
            assert not samples, "features are built from samples with frames"
            return []
        grids = [sample.grid_thw for sample, _ in samples if sample.grid_thw is not None]
        assert len(grids) in (0, len(samples)), "a batch mixes clips with a size of their own and without"
        features = encode(frames, grids or None)
        is_padded = isinstance(features, Tensor)
        return [
            self._collect(sample, content, _cut(own, sample) if is_padded else own)
            for (sample, content), own in zip(samples, features, strict=True)
        ]

    def flush(self) -> None:
        """Write what is collected as a shard.

        Raises:
            UserError: There is no room.
        """
        if self.since is None:
            return
        self.make_room(self.num_bytes)
        try:
            write_shard(self.folder, self.recipe.dtype, self._tensors, self._grids, self._skipped, self._errors)
        except OSError as error:
            if error.errno == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
                raise UserError(
                    f"the disk of {self.folder} is full: free some space and start again, which goes on from here, or set "
                    "cache.enabled=false"
                ) from error
            raise
        self._tensors, self._grids, self._skipped, self._errors = {}, {}, {}, ErrorSums()
        self.num_bytes, self.since = 0, None

    def _collect(self, sample: Sample, content: str, features: Tensor) -> int:
        features = features.detach()
        stored = {content: features.to(stored_type(self.recipe.dtype))}
        read = stored[content]
        if self.recipe.dtype == "int8":
            stored[content], stored[content + SCALE] = quantize(features)
            read = dequantize(stored[content], stored[content + SCALE])
        self._check(sample, features, read)
        self._errors.add(measure(features, read))
        self._tensors |= {name: _own(tensor, features) for name, tensor in stored.items()}
        if sample.grid_thw is not None:
            self._grids[content] = sample.grid_thw
        num_bytes = sum(tensor.nbytes for tensor in stored.values())
        self.num_bytes += num_bytes
        return num_bytes

    def _check(self, sample: Sample, features: Tensor, read: Tensor) -> None:
        shape = (features.shape[0], features.shape[1])
        if sample.grid_thw is None:
            self.shape = self.shape or shape
            is_other = shape[1] != self.shape[1] if self.recipe.variable_frames else shape != self.shape
            if is_other:
                raise UserError(
                    f"features of clip {sample.clip.id} are {shape}, earlier ones {self.shape}, and cannot share a cache: "
                    "set cache.enabled=false"
                )
        if not is_finite(read):
            mend = (
                f"overflow cache.dtype={self.recipe.dtype}: set cache.dtype=bfloat16"
                if is_finite(features)
                else "are not finite: the encoder overflows, choose another precision"
            )
            raise UserError(f"features of clip {sample.clip.id} {mend}")


def _cut(features: Tensor, sample: Sample) -> Tensor:
    """Without the padding that a batch of clips of different sizes has."""
    if sample.grid_thw is None:
        assert sample.frames is not None
        return features[: len(sample.frames)]
    frames, height, width = sample.grid_thw
    return features[:frames, : height * width]


def _own(tensor: Tensor, features: Tensor) -> Tensor:
    """In main memory, and not in that of the features: an encoder may give its next ones in the same place."""
    copy = tensor.cpu().contiguous()
    return copy.clone() if copy.untyped_storage().data_ptr() == features.untyped_storage().data_ptr() else copy
