"""Loaders of the three splits, resumable in the middle of an epoch."""

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
    """Training batches with labels; validation as prompts to caption and labelled batches of the same clips.

    Any split as prompts.

    Args:
        clips: Split name to clips.
        make_dataset: Clips to samples, decoded or out of the cache.
        train_collator: Makes labelled batches; packed or not is set here.
        prompt_collator: Makes left-padded prompts.
        data: Sizes of batches, how they are filled, and the number of worker processes of each loader.
        prompt_batch_size: Clips of a batch to caption.
        seed: Seed of the order of training clips.
        max_eval_clips: Clips of the validation split in the training loop.
        lengths: (N,), tokens of each training clip's whole sequence; None where clips are shuffled.
        pin_memory: Page-locked batches, which go to a GPU while it computes.
        is_evaluation_shared: False evaluates every clip on every rank, where ranks must take the same steps.
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
        """Batches of `data.batching`, ordered by seed and epoch.

        After a resume the first pass starts where the checkpoint stood.
        """
        rank, world_size = self._rank
        content = _content(self.clips["train"])
        plan = self._plan()
        sampler = BatchSampler(plan, seed=self.seed, rank=rank, world_size=world_size, content=content)
        if self._position is not None:
            sampler.load_state_dict(self._position)
            self._position = None
        collator = replace(self.train_collator, is_packed=self.data.batching is Batching.packed)
        num_clips = int(np.diff(plan.bounds).max(initial=1))
        return StatefulDataLoader(batch_sampler=sampler, **self._common(self.clips["train"], collator, num_clips))

    def val_dataloader(self, *, is_captioned: bool = True) -> DataLoader[Any]:
        """The clips of validation while training, to caption and with labels for the loss, or for the loss alone."""
        collator = ValidationCollator(self.prompt_collator, self.train_collator, self.data.batch_size, is_captioned)
        return self._eval_loader(self.clips["val"][: self.max_eval_clips], collator, self.prompt_batch_size)

    def prompt_loader(self, split: str) -> DataLoader[Any]:
        """Every clip of a split once, as prompts."""
        return self._eval_loader(self.clips[split], self.prompt_collator, self.prompt_batch_size)

    def sample_loader(self, clips: Sequence[Clip]) -> DataLoader[Any]:
        """Any clips once over all ranks, as lists of `Sample` and `Skipped` of the length of a batch to caption."""
        rank, world_size = self.evaluation_rank
        size = self.prompt_batch_size
        return DataLoader(
            sampler=range(rank, len(clips), world_size), batch_size=size, **self._common(clips, list, size)
        )

    def resume_at(self, position: Mapping[str, Any]) -> None:
        """Makes the next training loader start at a `BatchSampler.position`."""
        self._position = position

    def _plan(self) -> BatchPlan:
        """The training batches.

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
                "data.max_tokens_per_batch="
                f"{max_tokens}; set that to at least {lengths[longest]}, or lower llm.max_caption_tokens or "
                "data.num_frames"
            )
        if batching is Batching.by_length:
            return length_plan(lengths, batch_size=self.data.batch_size, max_tokens=max_tokens)
        assert max_tokens is not None, "the configuration asks for it"
        return packed_plan(lengths, max_tokens)

    def _eval_loader(
        self, clips: Sequence[Clip], collator: Callable[[list[Sample | Skipped]], object], batch_size: int
    ) -> DataLoader[Any]:
        """Each clip once over all ranks; some ranks have one less than others, as a repeated clip would count twice."""
        rank, world_size = self.evaluation_rank
        own = range(rank, len(clips), world_size)
        # A batch keeps a GPU busy for minutes, so one of each worker in advance is enough; with many rows its frames
        # are gigabytes.
        prefetch = 1 if self.data.num_workers else None
        return DataLoader(
            sampler=own, batch_size=batch_size, prefetch_factor=prefetch, **self._common(clips, collator, batch_size)
        )

    def _common(
        self, clips: Sequence[Clip], collator: Callable[[list[Sample | Skipped]], object], num_clips: int
    ) -> dict[str, Any]:
        """Arguments of every loader, whose batches have at most `num_clips` clips."""
        workers, dataset = self.data.num_workers, self.make_dataset(clips)
        return {
            "dataset": self.watch.over(dataset, clips) if workers else dataset,
            "collate_fn": collator,
            **worker_options(workers, num_clips, self.data.decode_timeout_s),
            "generator": torch.Generator(),  # of workers' seeds: drawn from the global one, they would make a resumed run another
            "persistent_workers": workers > 0,
            "pin_memory": self.pin_memory,
        }

    @property
    def evaluation_rank(self) -> tuple[int, int]:
        """Of this process among those that share a split, and their number."""
        return self._rank if self.is_evaluation_shared else (0, 1)

    @property
    def _rank(self) -> tuple[int, int]:
        """Of this process, and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _content(clips: Sequence[Clip]) -> str:
    """Eight hexadecimal digits for the ids and captions of a thousand clips, evenly spread.

    Other data sets differ in those.
    """
    content = hashlib.sha256()
    for index in range(0, len(clips), max(1, len(clips) // 1000)):
        clip = clips[index]
        content.update(json.dumps([clip.id, *clip.captions]).encode())
    return content.hexdigest()[:8]
