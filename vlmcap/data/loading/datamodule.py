"""Data loaders of the three splits; training can resume in the middle of an epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from vlmcap.config import Batching, DataConfig
from vlmcap.data.loading.batches import BatchPlan, BatchSampler, length_plan, packed_plan, shuffled_plan
from vlmcap.data.loading.collate import Collator, ValidationCollator
from vlmcap.data.loading.worker_report import WorkerWatch, worker_options
from vlmcap.errors import UserError
from vlmcap.types import Clip, Sample, Skipped


class CaptionDataModule(L.LightningDataModule):
    """Loads labelled batches for training, prompts and labelled batches for validation, and prompts of any split.

    Args:
        clips: Split name to clips.
        make_dataset: Function from clips to a data set of samples, decoded or from the feature store.
        train_collator: Collator of labelled batches; its packing is set here.
        prompt_collator: Collator of left-padded prompts.
        data: Data configuration: batch sizes, batching, and the number of worker processes per loader.
        prompt_batch_size: Clips per batch of prompts.
        seed: Seed of the order of training clips.
        max_eval_clips: Largest number of validation clips in the training loop.
        lengths: (N,) tokens of each training clip's whole sequence; None if clips are shuffled.
        pin_memory: Whether batches are page-locked, so that they are copied to a GPU while it computes.
        is_evaluation_shared: Whether ranks share the clips of an evaluation; False evaluates every clip on every rank,
            where ranks must take the same steps.
    """

    def __init__(
        self,
        clips: Mapping[str, Sequence[Clip]],
        make_dataset: Callable[[Sequence[Clip]], Dataset[Sample | Skipped]],
        train_collator: Collator,
        prompt_collator: Collator,
        data: DataConfig,
        *,
        prompt_batch_size: int,
        seed: int,
        max_eval_clips: int,
        lengths: NDArray[np.int64] | None = None,
        pin_memory: bool = False,
        is_evaluation_shared: bool = True,
    ) -> None:
        super().__init__()
        self.clips, self.make_dataset, self.data = clips, make_dataset, data
        self.prompt_batch_size, self.seed, self.max_eval_clips = prompt_batch_size, seed, max_eval_clips
        self.lengths, self.pin_memory, self.is_evaluation_shared = lengths, pin_memory, is_evaluation_shared
        self.train_collator, self.prompt_collator = train_collator, prompt_collator
        self.watch = WorkerWatch()
        self._position: Mapping[str, Any] | None = None

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Returns the training loader, ordered by seed and epoch; after a resume it starts at the saved position."""
        rank, world_size = self._rank
        content = _clips_digest(self.clips["train"])
        plan = self._plan()
        sampler = BatchSampler(plan, seed=self.seed, rank=rank, world_size=world_size, content=content)
        if self._position is not None:
            sampler.load_state_dict(self._position)
            # Only the first loader after a resume starts inside an epoch.
            self._position = None
        collator = replace(self.train_collator, is_packed=self.data.batching is Batching.packed)
        num_clips = int(np.diff(plan.bounds).max(initial=1))
        return StatefulDataLoader(
            batch_sampler=sampler, **self._loader_options(self.clips["train"], collator, num_clips)
        )

    def val_dataloader(self, *, is_captioned: bool = True) -> DataLoader[Any]:
        """Returns the validation clips of the training loop, as prompts and with labels, or only for the loss."""
        collator = ValidationCollator(self.prompt_collator, self.train_collator, self.data.batch_size, is_captioned)
        return self._eval_loader(self.clips["val"][: self.max_eval_clips], collator, self.prompt_batch_size)

    def prompt_loader(self, split: str) -> DataLoader[Any]:
        """Returns every clip of a split once, as prompts."""
        return self._eval_loader(self.clips[split], self.prompt_collator, self.prompt_batch_size)

    def sample_loader(self, clips: Sequence[Clip]) -> DataLoader[Any]:
        """Returns the clips once over all ranks, as lists of `Sample` and `Skipped`, one per batch of prompts."""
        rank, world_size = self.evaluation_rank
        size = self.prompt_batch_size
        return DataLoader(
            sampler=range(rank, len(clips), world_size), batch_size=size, **self._loader_options(clips, list, size)
        )

    def resume_at(self, position: Mapping[str, Any]) -> None:
        """Lets the next training loader start at a `BatchSampler.position`."""
        self._position = position

    def _plan(self) -> BatchPlan:
        """Plans the training batches.

        Raises:
            UserError: A clip is longer than a batch may be.
        """
        batching, max_tokens, lengths = self.data.batching, self.data.max_tokens_per_batch, self.lengths
        if batching is Batching.shuffled:
            return shuffled_plan(len(self.clips["train"]), self.data.batch_size)
        assert lengths is not None and len(lengths) == len(self.clips["train"])
        if max_tokens is not None and len(lengths) and lengths.max() > max_tokens:
            longest = int(lengths.argmax())
            raise UserError(
                f"the clip {self.clips['train'][longest].id} takes {lengths[longest]} tokens, more than "
                f"data.max_tokens_per_batch={max_tokens}; set that to at least {lengths[longest]}, or lower "
                "llm.max_caption_tokens or data.num_frames"
            )
        if batching is Batching.by_length:
            return length_plan(lengths, batch_size=self.data.batch_size, max_tokens=max_tokens)
        assert max_tokens is not None, "the configuration requires it"
        return packed_plan(lengths, max_tokens)

    def _eval_loader(
        self, clips: Sequence[Clip], collator: Callable[[list[Sample | Skipped]], object], batch_size: int
    ) -> DataLoader[Any]:
        """Returns each clip once over all ranks; ranks may differ by one clip, as a repeated clip would count twice."""
        rank, world_size = self.evaluation_rank
        indices = range(rank, len(clips), world_size)
        # A batch keeps a GPU busy for minutes, so each worker prefetches only one; the frames of a large batch take
        # gigabytes.
        prefetch = 1 if self.data.num_workers else None
        options = self._loader_options(clips, collator, batch_size)
        return DataLoader(sampler=indices, batch_size=batch_size, prefetch_factor=prefetch, **options)

    def _loader_options(
        self, clips: Sequence[Clip], collator: Callable[[list[Sample | Skipped]], object], num_clips: int
    ) -> dict[str, Any]:
        """Returns the arguments common to all loaders; batches have at most `num_clips` clips."""
        workers, dataset = self.data.num_workers, self.make_dataset(clips)
        return {
            "dataset": self.watch.watch(dataset, clips) if workers else dataset,
            "collate_fn": collator,
            **worker_options(workers, num_clips, self.data.decode_timeout_s),
            # Draws the workers' seeds; drawn from the global generator, they would change a resumed run.
            "generator": torch.Generator(),
            "persistent_workers": workers > 0,
            "pin_memory": self.pin_memory,
        }

    @property
    def evaluation_rank(self) -> tuple[int, int]:
        """Rank and number of the processes that share a split."""
        return self._rank if self.is_evaluation_shared else (0, 1)

    @property
    def _rank(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _clips_digest(clips: Sequence[Clip]) -> str:
    """Returns eight hexadecimal digits for the ids and captions of a thousand clips, evenly spread."""
    content = hashlib.sha256()
    for index in range(0, len(clips), max(1, len(clips) // 1000)):
        clip = clips[index]
        content.update(json.dumps([clip.id, *clip.captions]).encode())
    return content.hexdigest()[:8]
