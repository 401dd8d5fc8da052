"""Frames in, what is stored of them out: the encoder's part in filling a feature store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlmcap.assembly.parts import device_of, dtype_of
from vlmcap.config import Config, Precision

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vlmcap.data.loading.dataset import ClipDataset
    from vlmcap.models.encoders import VisionEncoder
    from vlmcap.types import GridTHW, Sample, Skipped

FRAMES_A_PASS = 128  # through the encoder


def encoding_of(
    config: Config, encoder: VisionEncoder
) -> Callable[[torch.Tensor, Sequence[GridTHW] | None], torch.Tensor | list[torch.Tensor]]:
    """A function from frames, and the clips' sizes where they vary, to what is stored of them."""
    import torch

    from vlmcap.models.projectors.reducers import PoolReducer

    device = torch.device(device_of(config))
    encoder.to(device)

    precision = config.hardware.precision
    # As in training, where norms of an encoder in half precision are computed in float32.
    autocast = torch.autocast(device.type, dtype_of(precision), enabled=precision is not Precision.fp32)

    @torch.no_grad()
    def encode(frames: torch.Tensor, grids: Sequence[GridTHW] | None) -> torch.Tensor:
        with autocast:
            features: torch.Tensor = encoder(frames.to(device), grids)
        return features

    if not config.cache.pooled:
        return encode
    pool = PoolReducer(config.projector.pool_size)

    @torch.no_grad()
    def encode_pooled(frames: torch.Tensor, grids: Sequence[GridTHW] | None) -> list[torch.Tensor]:
        features = encode(frames, grids).float()  # as the projector averages them
        sizes = grids or [(features.shape[1], *encoder.grid)] * len(features)
        return [
            pool(own[None, :count, : rows * columns], (rows, columns))[0]
            for own, (count, rows, columns) in zip(features, sizes, strict=True)
        ]

    return encode_pooled


def batches_of(dataset: ClipDataset, batch_size: int, num_workers: int) -> Callable[[NDArray[np.int64]], Iterable[list[Sample | Skipped]]]:
    """A function from positions in a data set to their samples, in lists for one pass of the encoder."""
    import torch
    from torch.utils.data import DataLoader

    from vlmcap.data.loading.worker_report import WorkerWatch, worker_options

    def batches(positions: NDArray[np.int64]) -> Iterator[list[Sample | Skipped]]:
        watch, workers = WorkerWatch(), min(num_workers, len(positions))
        loader = DataLoader(
            watch.over(dataset, dataset.clips) if workers else dataset,
            batch_size=batch_size,
            sampler=positions.tolist(),
            collate_fn=list,
            generator=torch.Generator(),
            **worker_options(workers, batch_size, dataset.settings.limits.timeout_s),
        )
        with watch.naming_clips():
            yield from loader

    return batches


def free_memory() -> None:
    """Gives back what models held that nobody refers to any more."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
