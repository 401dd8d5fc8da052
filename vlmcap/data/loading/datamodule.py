"""Loaders of the three splits, resumable in the middle of an epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from vlmcap.data.loading.batches import BatchPlan, BatchSampler, length_plan, packed_plan, shuffled_plan
from vlmcap.data.loading.collate import Collator
from vlmcap.data.loading.worker_report import WorkerWatch, worker_options
from vlmcap.errors import UserError
from vlmcap.types import Clip, Sample, Skipped


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """Sizes of batches and number of worker processes.

    Attributes:
        batch_size: Clips of a training batch; unused where `max_tokens_per_batch` is given.
        eval_batch_size: Clips of a labelled batch of validation.
        prompt_batch_size: Clips of a batch to caption.
        num_workers: Of each loader; 0 reads in this process.
        seed: Of the order of training clips.
        max_eval_clips: Of the validation split in the training loop.
        pin_memory: Page-locked batches, which go to a GPU while it computes.
        batching: shuffled, by_length or packed.
        max_tokens_per_batch: Most tokens of a training batch, padding included.
        lengths: (N,), tokens of each training clip's whole sequence; None where clips are shuffled.
        is_evaluation_shared: False evaluates every clip on every rank, where ranks must take the same steps.
        clip_timeout_s: After which the reading of a clip is given up; batches of workers are waited for accordingly.
    """

    batch_size: int
    eval_batch_size: int
    prompt_batch_size: int
    num_workers: int
    seed: int
    max_eval_clips: int
    pin_memory: bool = False
    batching: str = "shuffled"
    max_tokens_per_batch: int | None = None
    lengths: NDArray[np.int64] | None = None
    is_evaluation_shared: bool = True
    clip_timeout_s: float = 60.0


class CaptionDataModule(L.LightningDataModule):
    """Training batches with labels; validation as prompts to caption and as labelled batches for the loss; any split as prompts.

    Args:
        clips: Split name to clips.
        make_dataset: Clips to samples, decoded or out of the cache.
        train_collator: Makes labelled batches; packed or not is set here.
        prompt_collator: Makes left-padded prompts.
        settings: Sizes.
    """

    def __init__(
        self,
        clips: Mapping[str, Sequence[Clip]],
        make_dataset: Callable[[Sequence[Clip]], Dataset[Sample | Skipped]],
        train_collator: Collator,
        prompt_collator: Collator,
        settings: LoaderSettings,
    ) -> None:
        super().__init__()
        self.clips, self.make_dataset, self.settings = clips, make_dataset, settings
        self.train_collator, self.prompt_collator = train_collator, prompt_collator
        self.watch = WorkerWatch()
        self._position: Mapping[str, Any] | None = None

    def train_dataloader(self) -> StatefulDataLoader[Any]:
        """Batches of `settings.batching`, ordered by seed and epoch; after a resume the first pass starts where the checkpoint stood."""
        rank, world_size = self._rank
        content = _content(self.clips["train"])
        plan = self._plan()
        sampler = BatchSampler(plan, seed=self.settings.seed, rank=rank, world_size=world_size, content=content)
        if self._position is not None:
            sampler.load_state_dict(self._position)
            self._position = None
        collator = replace(self.train_collator, is_packed=self.settings.batching == "packed")
        num_clips = int(np.diff(plan.bounds).max(initial=1))
        return StatefulDataLoader(batch_sampler=sampler, **self._common(self.clips["train"], collator, num_clips))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The clips to caption while training, then the same clips with labels for the loss."""
        clips = self.clips["val"][: self.settings.max_eval_clips]
        return [
            self._eval_loader(clips, self.prompt_collator, self.settings.prompt_batch_size),
            self._eval_loader(clips, self.train_collator, self.settings.eval_batch_size),
        ]

    def prompt_loader(self, split: str) -> DataLoader[Any]:
        """Every clip of a split once, as prompts."""
        return self._eval_loader(self.clips[split], self.prompt_collator, self.settings.prompt_batch_size)

    def sample_loader(self, clips: Sequence[Clip]) -> DataLoader[Any]:
        """Any clips once over all ranks, as lists of `Sample` and `Skipped` of the length of a batch to caption."""
        rank, world_size = self.evaluation_rank
        size = self.settings.prompt_batch_size
        return DataLoader(sampler=range(rank, len(clips), world_size), batch_size=size, **self._common(clips, list, size))

    def resume_at(self, position: Mapping[str, Any]) -> None:
        """Makes the next training loader start at a `BatchSampler.position`."""
        self._position = position

    def _plan(self) -> BatchPlan:
        """The training batches.

        Raises:
            UserError: A clip is longer than a batch may be, or the settings do not go together.
        """
        batching, max_tokens, lengths = self.settings.batching, self.settings.max_tokens_per_batch, self.settings.lengths
        if batching == "shuffled":
            if max_tokens is not None:
                raise UserError("data.max_tokens_per_batch needs data.batching=by_length or packed; clips in any order fill no budget")
            return shuffled_plan(len(self.clips["train"]), self.settings.batch_size)
        assert lengths is not None and len(lengths) == len(self.clips["train"])
        if max_tokens is not None and len(lengths) and lengths.max() > max_tokens:
            longest = int(lengths.argmax())
            raise UserError(
                f"the clip {self.clips['train'][longest].id} takes {lengths[longest]} tokens, more than data.max_tokens_per_batch="
                f"{max_tokens}; set that to at least {lengths[longest]}, or lower llm.max_caption_tokens or data.num_frames"
            )
        if batching == "by_length":
            return length_plan(lengths, batch_size=self.settings.batch_size, max_tokens=max_tokens)
        if max_tokens is None:
            raise UserError("data.batching=packed needs data.max_tokens_per_batch: the length of a row that clips are packed into")
        return packed_plan(lengths, max_tokens)

    def _eval_loader(self, clips: Sequence[Clip], collator: Collator, batch_size: int) -> DataLoader[Any]:
        """Each clip once over all ranks; some ranks have one less than others, as a repeated clip would count twice."""
        rank, world_size = self.evaluation_rank
        own = range(rank, len(clips), world_size)
        return DataLoader(sampler=own, batch_size=batch_size, **self._common(clips, collator, batch_size))

    def _common(self, clips: Sequence[Clip], collator: Callable[[list[Sample | Skipped]], object], num_clips: int) -> dict[str, Any]:
        """Arguments of every loader, whose batches have at most `num_clips` clips."""
        workers, dataset = self.settings.num_workers, self.make_dataset(clips)
        return {
            "dataset": self.watch.over(dataset, clips) if workers else dataset,
            "collate_fn": collator,
            **worker_options(workers, num_clips, self.settings.clip_timeout_s),
            "generator": torch.Generator(),  # of workers' seeds: drawn from the global one, they would make a resumed run another
            "persistent_workers": workers > 0,
            "pin_memory": self.settings.pin_memory,
        }

    @property
    def evaluation_rank(self) -> tuple[int, int]:
        """Of this process among those that share a split, and their number."""
        return self._rank if self.settings.is_evaluation_shared else (0, 1)

    @property
    def _rank(self) -> tuple[int, int]:
        """Of this process, and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _content(clips: Sequence[Clip]) -> str:
    """Eight hexadecimal digits for the ids and captions of a thousand clips, evenly spread: other data sets differ in those."""
    content = hashlib.sha256()
    for index in range(0, len(clips), max(1, len(clips) // 1000)):
        clip = clips[index]
        content.update(json.dumps([clip.id, *clip.captions]).encode())
    return content.hexdigest()[:8]
