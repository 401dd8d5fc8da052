"""Stores the features of a frozen encoder before the language model is loaded, and reads them while training."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlmcap.assembly.base_checkpoints import ENCODER_KEYS, BaseCheckpoints, encoder_configs, vision_component
from vlmcap.assembly.clips import Splits, with_blank
from vlmcap.assembly.components import autocast_dtype, device_of, load_encoder
from vlmcap.assembly.datasets import FeaturePlan, grid_of_frames
from vlmcap.config import Config, EncoderTuning, Sampling
from vlmcap.plugins import plugins_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch.utils.data import Dataset

    from vlmcap.data.features.recipe import Recipe
    from vlmcap.data.features.store import FeatureStore
    from vlmcap.data.loading.clip_dataset import ClipDataset
    from vlmcap.models.encoders import VisionEncoder
    from vlmcap.types import Clip, FrameTimes, GridTHW, Sample, Skipped

FRAMES_PER_PASS = 128  # frames per forward pass of the encoder
_SILENT_S = 2.0  # shorter hashing prints nothing; hashes are cached, so it usually takes no time


@dataclass(frozen=True, slots=True)
class Features:
    """The feature store of a configuration, with the keys of its clips.

    Attributes:
        store: Store that holds the features.
        clips: Clips of each split.
        hashes: Content hashes of the clips of each split, in their order; they are the keys of the store.
        hash_file: File that caches the hashes of media files.
        pool_size: Patches per side that were averaged before storing; None if the encoder's features are stored.
        second: Features of the second of two joined encoders.
        join_grids: Patch grids of both encoders.
    """

    store: FeatureStore
    clips: Mapping[str, Sequence[Clip]]
    hashes: Mapping[str, NDArray[np.bytes_]]
    hash_file: Path
    pool_size: int | None = None
    second: Features | None = None
    join_grids: tuple[tuple[int, int], tuple[int, int]] | None = None

    def hashes_of(self, clips: Sequence[Clip]) -> NDArray[np.bytes_]:
        """Returns the content hashes of a full split, or of any of its clips."""
        from vlmcap.data.features.content_hash import content_hashes

        # Hashes of full splits are known already. Identity is enough, because loaders pass on the same objects.
        split = next((split for split, members in self.clips.items() if members is clips), None)
        return content_hashes(clips, self.hash_file) if split is None else self.hashes[split]

    def dataset(self, clips: Sequence[Clip]) -> Dataset[Sample | Skipped]:
        """Builds a data set of the features of a full split, or of any of its clips."""
        from vlmcap.assembly.joined_features import JoinedFeatureDataset
        from vlmcap.data.features.feature_dataset import FeatureDataset, PooledFeatureDataset

        hashes = self.hashes_of(clips)
        if self.second is not None and self.join_grids is not None:
            first, second = (FeatureDataset(clips, hashes, store) for store in (self.store, self.second.store))
            return JoinedFeatureDataset(first, second, self.join_grids)
        if self.pool_size is None:
            return FeatureDataset(clips, hashes, self.store)
        return PooledFeatureDataset(clips, hashes, self.store, self.pool_size)

    def layouts(self, clips: Sequence[Clip]) -> Iterator[tuple[GridTHW | None, FrameTimes | None]]:
        """Yields size in patches (None for the encoder's grid) and times of each clip; both None without features."""
        from vlmcap.data.features.feature_dataset import pooled_grid

        for content in self.hashes_of(clips):
            # Numpy gives a scalar of its own, which is not a key of the index.
            name = bytes(content)
            grid, times_s = (
                (self.store.grid_thw(name), self.store.times_s(name)) if name in self.store else (None, None)
            )
            yield pooled_grid(grid, self.pool_size) if grid and self.pool_size else grid, times_s


def prepare_features(plan: FeaturePlan, clips: Mapping[str, Sequence[Clip]]) -> Features | None:
    """Stores the features of all clips, and of the black clip if visual reliance is measured.

    The encoder is loaded only if features are missing, and freed before returning.

    Args:
        plan: Feature plan of the configuration.
        clips: Clips of each split.

    Returns:
        The features, or None if `cache.enabled` is false, or auto and storing them saves no time.

    Raises:
        UserError: The disk is full, or no clip can be read.
    """
    from vlmcap.data.features.eviction import prune

    # 1. Decide whether features are stored.
    config = plan.config
    if config.cache.enabled is False:
        return None
    clips = with_blank(config, clips)
    plans = plans_of(plan)
    stores = [open_store(one) for one in plans]
    # With two encoders, both stores must be worth it: the joined data set reads both.
    if config.cache.enabled == "auto" and not all(
        _is_worthwhile(one, store, clips) for one, store in zip(plans, stores, strict=True)
    ):
        return None
    # 2. Hash the media, and encode what is missing, store by store.
    hash_file = hash_cache(config)
    hashes = hash_clips(clips, hash_file)
    for one, store in zip(plans, stores, strict=True):
        fill_store(one, store, clips, hashes)
    # 3. Remove old stores over the limit, but never those of this run.
    if config.cache.max_gib is not None:
        prune(stores[0].root, round(config.cache.max_gib * 2**30), keep=[store.key for store in stores])
    features = [Features(store, clips, hashes, hash_file, config.pool_size) for store in stores]
    if len(features) == 1:
        return features[0]
    return dataclasses.replace(features[0], second=features[1], join_grids=cast(Any, plan.meta_encoder).grids)


def plans_of(plan: FeaturePlan) -> list[FeaturePlan]:
    """Returns the feature plan of each of two joined encoders, which is that of the encoder alone; else the plan."""
    configs = encoder_configs(plan.config)
    if len(configs) == 1:
        return [plan]
    plans = []
    for config, key, encoder in zip(configs, ENCODER_KEYS, cast(Any, plan.meta_encoder).encoders, strict=True):
        # The second encoder's files move to the key "encoder", so that its recipe equals that of a run with it alone.
        folder, base = plan.base_checkpoints.folders[key], plan.base_checkpoints.fingerprints[key]
        base_checkpoints = BaseCheckpoints({"encoder": folder}, {"encoder": base})
        grid_of = grid_of_frames(config, encoder)
        plans.append(FeaturePlan(config, base_checkpoints, encoder, grid_of, plan.num_visual_tokens))
    return plans


def open_store(plan: FeaturePlan) -> FeatureStore:
    """Opens the store of a configuration's features, which may be empty."""
    from vlmcap.data.features.store import FeatureStore

    return FeatureStore(features_folder(plan.config), recipe_of(plan))


def features_folder(config: Config) -> Path:
    """Returns the folder of all feature stores."""
    return Path(config.paths.cache_dir) / "features"


def hash_cache(config: Config) -> Path:
    """Returns the file that caches the content hashes of media."""
    return Path(config.paths.cache_dir) / "content.sqlite"


def recipe_of(plan: FeaturePlan) -> Recipe:
    """Returns everything that features depend on besides the clips, which is the key of their store."""
    from vlmcap.data.decoding.torchcodec_reader import resolve_decoder
    from vlmcap.data.features.recipe import Recipe

    config = plan.config
    base = plan.base_checkpoints.fingerprints[vision_component(config)]
    transform = cast(Any, plan.meta_encoder.transform)
    settings = {"kind": type(transform).__name__, **dataclasses.asdict(transform)}
    if getattr(plan.meta_encoder, "is_normed", False):
        settings["is_normed"] = True  # the same layer of the same tower has other features without its final norm
    plugin = plugins_of(config).get("encoder")
    # A plugin's code and settings change its features as well as its weights do, so they are part of the key.
    code = json.dumps([base.sha256, plugin, dataclasses.asdict(config.encoder)], sort_keys=True, default=str)
    return Recipe(
        encoder=base.sha256 if plugin is None else hashlib.sha256(code.encode()).hexdigest(),
        layer=plan.meta_encoder.feature_layer,
        transform=settings,
        # Everything below decides which pixels the encoder sees.
        num_frames=config.data.num_frames,
        sampling=config.data.sampling.value,
        fps=config.data.fps if config.data.sampling is Sampling.fps else 0.0,
        variable_frames=config.data.variable_frames,
        decoder=resolve_decoder(config.data.decoder).value,
        pooled={"kind": "pool", "size": config.pool_size} if config.pool_size else None,
        precision=config.hardware.precision.value,
        # The dtype of storage; `precision` is that of computation.
        dtype=config.cache.dtype,
        encoder_name=base.name,
        # Name and revision are for people; `encoder` above is the identity.
        revision=base.revision,
    )


def hash_clips(clips: Mapping[str, Sequence[Clip]], hash_file: Path) -> dict[str, NDArray[np.bytes_]]:
    """Returns the content hashes of the clips of each split."""
    from vlmcap.data.features.content_hash import content_hashes
    from vlmcap.terminal import progress_reporter

    hashes = {}
    for split, members in clips.items():
        with progress_reporter(f"hashing the {split} split", silent_s=_SILENT_S) as report:
            hashes[split] = content_hashes(members, hash_file, report)
    return hashes


def warn_about_clips(config: Config, clips: Mapping[str, Sequence[Clip]]) -> None:
    """Warns about captions that were left out, videos in several splits, and too little shared memory for workers."""
    from vlmcap.data.loading.shared_memory import shared_memory_problem
    from vlmcap.data.overlap import describe_overlap

    note = clips.note if isinstance(clips, Splits) else ""
    problem = shared_memory_problem() if config.data.num_workers else None
    overlap = None if config.trainer.overfit else describe_overlap(clips, hash_cache(config))
    for sentence in (note, overlap, problem):
        if sentence:
            print(f"Warning: {sentence}", file=sys.stderr, flush=True)


def clip_bytes(plan: FeaturePlan) -> int:
    """Returns the bytes of a clip's features; the largest if sizes vary."""
    from vlmcap.data.features.feature_dataset import pooled_grid
    from vlmcap.data.features.precision import size_bytes

    config, meta_encoder = plan.config, plan.meta_encoder
    grids = meta_encoder.possible_grids(config.data.num_frames)
    if config.pool_size is not None:
        grids = [pooled_grid(grid, config.pool_size) for grid in grids]
    return max(
        size_bytes(1, frames, rows * columns, meta_encoder.embed_dim, config.cache.dtype)
        for frames, rows, columns in grids
    )


def fill_store(
    plan: FeaturePlan,
    store: FeatureStore,
    clips: Mapping[str, Sequence[Clip]],
    hashes: Mapping[str, NDArray[np.bytes_]],
) -> None:
    """Encodes the missing clips split by split, and prints their number and size; loads the encoder only if needed.

    Raises:
        UserError: The disk is full, or no clip can be read.
    """
    import torch

    from vlmcap.data.features import filling
    from vlmcap.terminal import gigabytes, grouped, progress_reporter

    # Clips that were lost earlier, for example because of a decoding timeout, are tried again.
    missing = {split: len(store.missing(wanted, retry_lost=True)) for split, wanted in hashes.items()}
    if not any(missing.values()):
        return
    config, size = plan.config, clip_bytes(plan)
    encode = encoding_of(config, load_encoder(config, plan.base_checkpoints.folders))
    num_frames = max(frames for frames, _, _ in plan.meta_encoder.possible_grids(config.data.num_frames))
    max_bytes = None if config.cache.max_gib is None else round(config.cache.max_gib * 2**30)
    with torch.random.fork_rng(devices=[]):  # the random state does not depend on what was missing
        for split in [split for split, count in missing.items() if count]:
            print(
                f"encoding the {split} split: {grouped(missing[split])} clips, {gigabytes(missing[split] * size)}",
                flush=True,
            )
            with progress_reporter(f"encoding the {split} split") as report:
                filling.fill_store(
                    store,
                    hashes[split],
                    # Clips per pass, so that a pass has about FRAMES_PER_PASS frames.
                    _batches_of(
                        plan.decoded(clips[split]), max(1, FRAMES_PER_PASS // num_frames), config.data.num_workers
                    ),
                    encode,
                    progress=report,
                    on_wait=functools.partial(print, flush=True),
                    retry_lost=True,
                    max_bytes=max_bytes,
                )
    # The closure holds the encoder, which must leave memory before the language model is loaded.
    del encode
    free_memory()


def _is_worthwhile(plan: FeaturePlan, store: FeatureStore, clips: Mapping[str, Sequence[Clip]]) -> bool:
    """Decides `cache.enabled=auto`, and prints the reason in one line."""
    from vlmcap.assembly.cache_choice import choose_cache, estimate_costs

    if obstacle := _obstacle(plan.config):
        print(f"cache.enabled=auto: off, because {obstacle}")
        return False
    choice = choose_cache(estimate_costs(plan, store, clips, clip_bytes(plan)))
    print(choice.sentence, flush=True)
    return choice.is_on


def _obstacle(config: Config) -> str | None:
    """Returns why features of this configuration cannot be stored, or None."""
    if config.tuning.encoder_tuning is not EncoderTuning.none:
        return f"tuning.encoder={config.tuning.encoder_tuning.name} changes the features"
    changed_by = config.data.changed_by
    return None if changed_by is None else f"{changed_by} changes the frames in every epoch"


def encoding_of(
    config: Config, encoder: VisionEncoder
) -> Callable[[torch.Tensor, Sequence[GridTHW] | None], torch.Tensor | list[torch.Tensor]]:
    """Returns the function `(frames, grids)` that computes the features to store; grids are None if sizes are fixed."""
    import torch

    from vlmcap.models.precision import autocast
    from vlmcap.models.projectors.reducers import pool_grid

    device = torch.device(device_of(config))
    encoder.to(device)

    @torch.no_grad()
    def encode(frames: torch.Tensor, grids: Sequence[GridTHW] | None) -> torch.Tensor:
        pinned = frames.pin_memory() if device.type == "cuda" else frames
        # As in training, where the norms of a half precision encoder run in float32.
        with autocast(device, autocast_dtype(config)):
            features: torch.Tensor = encoder(pinned.to(device, non_blocking=True), grids)
        return features

    if (size := config.pool_size) is None:
        return encode

    @torch.no_grad()
    def encode_pooled(frames: torch.Tensor, grids: Sequence[GridTHW] | None) -> list[torch.Tensor]:
        features = encode(frames, grids).float()  # the projector also averages in float32
        sizes = grids or [(features.shape[1], *encoder.grid)] * len(features)
        # (B, F, P, Dv), padded -> B times (F, h · w / size², Dv)
        return [
            pool_grid(clip[None, :count, : rows * columns], (rows, columns), size)[0]
            for clip, (count, rows, columns) in zip(features, sizes, strict=True)
        ]

    return encode_pooled


def _batches_of(
    dataset: ClipDataset, batch_size: int, num_workers: int
) -> Callable[[NDArray[np.int64]], Iterable[list[Sample | Skipped]]]:
    """Returns a function that yields the samples at given positions, in lists for one pass of the encoder."""
    import torch
    from torch.utils.data import DataLoader

    from vlmcap.data.loading.worker_report import WorkerWatch, worker_options

    def batches(positions: NDArray[np.int64]) -> Iterator[list[Sample | Skipped]]:
        # More workers than clips would only cost their start.
        watch, workers = WorkerWatch(), min(num_workers, len(positions))
        loader = DataLoader(
            watch.watch(dataset, dataset.clips) if workers else dataset,
            batch_size=batch_size,
            sampler=positions.tolist(),
            collate_fn=list,
            # Seeds of workers come from a generator of their own, so that the global random state does not change.
            generator=torch.Generator(),
            **worker_options(workers, batch_size, dataset.data.decode_timeout_s),
        )
        with watch.as_user_errors():
            yield from loader

    return batches


def free_memory() -> None:
    """Frees the memory of models that are no longer referenced."""
    import gc

    import torch

    # Models contain reference cycles, so that their memory is not freed when the last name is deleted.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
