"""A data set whose clips are decoded when they are read.

Legend: F frames, H/W pixels.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmcap.config import DataConfig
from vlmcap.data.decoding.augment import augment_frames
from vlmcap.data.decoding.torchcodec_reader import resolve_decoder
from vlmcap.data.decoding.video import DecodeLimits, VideoError, pad_frames, read_timed_frames
from vlmcap.data.loading.isolation import Answer, Isolated, LostError, is_available, is_out_of_memory
from vlmcap.data.loading.shared_memory import shared_zeros
from vlmcap.errors import UserError, first_line
from vlmcap.types import CLOCKLESS_FPS, Clip, GridTHW, Sample, Skipped

Key = int | tuple[int, int]
"""An index, or (epoch, index) in training."""


class ClipDataset(Dataset[Sample | Skipped]):
    """Clips with frames, resized for the encoder.

    A clip that cannot be read gives a `Skipped`, no matter what its file does to the decoder.

    A key (epoch, index) is a training sample, whose randomness depends on (seed, epoch, index) alone. A bare index
    always gives the same frames, without augmentation.

    A clip that exceeded its time limit is not tried again: two of a hundred that hang would cost the limit in each
    epoch.

    Args:
        clips: Clips, in the order of the indices.
        data: Data configuration; only training samples are augmented.
        seed: Seed of all randomness.
        frame_transform: uint8 (F, 3, H, W) of any size -> uint8 as the encoder expects it; picklable for data workers.
        grid_of: F, H and W of decoded frames -> the clip's size in patches, or None for an encoder of fixed size;
            picklable too.
        limits: Further limits on what a clip may cost; `DecodeLimits()` by default.

    Raises:
        UserError: The decoder that `data` names cannot be loaded.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        data: DataConfig,
        *,
        seed: int,
        frame_transform: Callable[[Tensor], Tensor],
        grid_of: Callable[[int, int, int], GridTHW | None] | None = None,
        limits: DecodeLimits | None = None,
    ) -> None:
        resolve_decoder(data.decoder)  # before the workers start, so that the error is raised here
        with suppress(ImportError):  # before they are forked, so that they share the library; images do not need it
            importlib.import_module("vlmcap.data.decoding.frame_reader")
        self.clips, self.data, self.seed, self.limits = clips, data, seed, limits
        self.frame_transform, self.grid_of = frame_transform, grid_of
        is_isolated = data.is_isolated and is_available()
        self._isolated = Isolated(data.decode_timeout_s, data.decode_memory_gib) if is_isolated else None
        self._is_too_slow = shared_zeros(len(clips), dtype=torch.bool)  # shared by all workers

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: Key) -> Sample | Skipped:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        clip, timeout_s = self.clips[index], self.data.decode_timeout_s
        if self._is_too_slow[index]:
            reason = f"decoding took longer than data.decode_timeout_s={timeout_s:g} before"
            return Skipped(clip, _cannot_read(clip, reason), is_final=False)
        begun_s = time.monotonic()
        item = self._sample(clip, [None if epoch is None else int(epoch), int(index)])
        if isinstance(item, Skipped) and time.monotonic() - begun_s >= timeout_s:
            self._is_too_slow[index] = True
        return item

    def _sample(self, clip: Clip, request: list[int | None]) -> Sample | Skipped:
        try:
            facts, frames = self._read(request) if self._isolated is None else self._isolated.call(self._read, request)
        except LostError as error:
            return Skipped(clip, _cannot_read(clip, str(error)), is_final=False)
        if frames is None:
            return Skipped(clip, facts["reason"], is_final=facts["is_final"])
        grid_thw = facts["grid_thw"]
        return Sample(
            clip, frames=frames, grid_thw=None if grid_thw is None else tuple(grid_thw), times_s=tuple(facts["times_s"])
        )

    def _read(self, request: list[int | None]) -> Answer:
        """Returns grid, times and frames of a clip, or the reason why it cannot be read."""
        epoch, index = request
        assert index is not None
        clip = self.clips[index]
        # One generator per sample, so that results do not depend on which worker reads it.
        rng = None if epoch is None else np.random.default_rng([self.seed, epoch, index])
        try:
            return self._frames(clip, rng)
        except VideoError as error:
            return {"reason": str(error), "is_final": error.is_final}, None
        except UserError:
            raise
        except Exception as error:  # a bad file can raise anything in a library; max_bad_fraction catches our bugs
            if is_out_of_memory(error) and self._isolated is not None:
                raise
            return {"reason": _cannot_read(clip, _describe(error)), "is_final": False}, None

    def _frames(self, clip: Clip, rng: np.random.Generator | None) -> Answer:
        data = self.data
        frames, times_s = read_timed_frames(clip, data, rng=rng, limits=self.limits)
        if times_s is None:
            times_s = torch.arange(len(frames), dtype=torch.float64) / CLOCKLESS_FPS
        if not data.variable_frames:
            frames, times_s = pad_frames(frames, data.num_frames), pad_frames(times_s, data.num_frames)
        # Only training samples have a generator.
        if rng is not None:
            frames = augment_frames(frames, data.augment, rng)
        num_frames, _, height, width = frames.shape
        grid_thw = None if self.grid_of is None else self.grid_of(num_frames, height, width)
        return {"grid_thw": grid_thw, "times_s": times_s.tolist()}, self.frame_transform(frames)


def _cannot_read(clip: Clip, reason: str) -> str:
    name = clip.video if "://" in clip.video else PurePath(clip.video).name
    return f"{name} cannot be read: {reason}"


def _describe(error: Exception) -> str:
    """Describes an error with the line that raised it, since its traceback ends here."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({PurePath(frame.filename).name}:{frame.lineno})"
