"""Clips, loaders and the feature cache of a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.build.model import Assembly
from vlmcap.build.parts import device_of
from vlmcap.config import Config, Split

if TYPE_CHECKING:
    import torch

    from vlmcap.data.datamodule import CaptionDataModule
    from vlmcap.data.dataset import ClipDataset
    from vlmcap.types import Clip, GridTHW


RECIPE = 1  # of cached features: raise when code that they depend on changes, such as which frames are taken
FRAMES_A_PASS = 128  # through the encoder when features are cached


def load_clips(config: Config, split: Split) -> list[Clip]:
    """The clips of a split.

    Raises:
        UserError: The split is missing, empty or broken.
    """
    from vlmcap.data.aihub import load_aihub

    clips = load_aihub(config.data.root, split.value, config.data.caption_key)
    if split is Split.train and config.data.max_clips is not None:
        import random

        order = random.Random(config.seed).sample(range(len(clips)), len(clips))  # subsets of one seed are nested
        clips = [clips[index] for index in sorted(order[: config.data.max_clips])]
    return clips


def load_splits(config: Config, splits: Sequence[Split]) -> dict[str, list[Clip]]:
    """Split name to its clips.

    Raises:
        UserError: A split is missing, empty or broken.
    """
    return {split.value: load_clips(config, split) for split in splits}


def build_data(config: Config, assembly: Assembly, clips: Mapping[str, Sequence[Clip]]) -> CaptionDataModule:
    """Loaders for splits as `load_splits` returns them, from the feature cache where it is enabled."""
    from vlmcap.data.collate import Collator
    from vlmcap.data.datamodule import CaptionDataModule, LoaderSettings

    collator = Collator(assembly.captioner.prompt, assembly.visual, config.llm.max_caption_tokens)
    make_dataset = dataset_maker(config, assembly, clips)
    settings = LoaderSettings(
        batch_size=config.data.batch_size,
        eval_batch_size=config.data.eval_batch_size,
        # Small features are read faster than a worker hands them over; those of real encoders, tens of MB a clip, are not.
        num_workers=0 if config.cache.enabled and config.encoder.is_cached else config.data.num_workers,
        seed=config.seed,
        max_eval_clips=config.evaluation.max_clips,
        pin_memory=config.hardware.accelerator != "cpu",
    )
    return CaptionDataModule(clips, make_dataset, collator, dataclasses.replace(collator, mode="generate"), settings)


def decoded_dataset(config: Config, assembly: Assembly, clips: Sequence[Clip]) -> ClipDataset:
    """Clips with frames, decoded as the encoder wants them."""
    from vlmcap.data.dataset import ClipDataset

    return ClipDataset(
        clips,
        num_frames=config.data.num_frames,
        frame_transform=assembly.transform,
        grid_of=assembly.grid_of,
        decode_timeout_s=config.data.decode_timeout_s,
    )


def dataset_maker(config: Config, assembly: Assembly, clips: Mapping[str, Sequence[Clip]]) -> Callable[[Sequence[Clip]], Any]:
    """A function from clips to their data set: decoded frames, or features of the cache, which is built here if need be."""
    from vlmcap.data.dataset import FeatureDataset
    from vlmcap.data.feature_cache import FeatureCache, cache_key, clips_fingerprint
    from vlmcap.training.progress import progress_reporter

    if not config.cache.enabled:
        return lambda chosen: decoded_dataset(config, assembly, chosen)
    base = "model" if config.is_whole else "encoder"
    owner: dict[tuple[str, Path], FeatureCache] = {}  # ids are unique within a split only
    for split, members in clips.items():
        key = cache_key(
            recipe=RECIPE,
            kind=type(assembly.transform).__name__,
            encoder=assembly.sources.bases[base].sha256,
            layer=config.encoder.feature_layer,
            num_frames=config.data.num_frames,
            transform=dataclasses.asdict(assembly.transform),  # type: ignore[call-overload]
            precision=config.hardware.precision.value,
            dtype=config.cache.dtype,
            clips=clips_fingerprint(members),
        )
        cache = FeatureCache(Path(config.paths.cache_dir) / "features", key)
        if not cache.is_complete:
            report = progress_reporter(f"encoding the {split} split")
            fill_cache(config, assembly, cache, decoded_dataset(config, assembly, members), report)
        owner |= {(clip.id, clip.video): cache for clip in members}

    def cached(chosen: Sequence[Clip]) -> FeatureDataset:
        found = {owner[clip.id, clip.video].key: owner[clip.id, clip.video] for clip in chosen}
        assert len(found) <= 1, "clips of one split"
        return FeatureDataset(chosen, next(iter(found.values()), cache))

    return cached


def fill_cache(config: Config, assembly: Assembly, cache: Any, dataset: Any, report: Callable[[int, int], None]) -> None:
    """Runs the frozen encoder over a split once and stores what it gives."""
    import torch
    from torch.utils.data import DataLoader

    encoder = assembly.captioner.encoder
    assert encoder is not None
    device = torch.device(device_of(config))
    encoder.to(device)
    frames = max(frames for frames, _, _ in encoder.possible_grids(config.data.num_frames))
    loader = DataLoader(dataset, batch_size=max(1, FRAMES_A_PASS // frames), collate_fn=list, num_workers=config.data.num_workers)

    @torch.no_grad()
    def encode(frames: torch.Tensor, grid_thw: Sequence[GridTHW] | None) -> torch.Tensor:
        features: torch.Tensor = encoder(frames.to(device), grid_thw)
        return features

    cache.build(loader, encode, len(dataset), config.cache.dtype, progress=report)
