"""Loaders of the three splits, resumable in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from vlmcap.data.collate import Collator
from vlmcap.data.sampler import ResumableSampler
from vlmcap.types import Clip, Sample, Skipped


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """Sizes of batches (clips) and number of worker processes."""

    batch_size: int
    eval_batch_size: int
    num_workers: int
    seed: int
    max_eval_clips: int  # of the validation split in the training loop
    pin_memory: bool = False  # page-locked batches, which go to a GPU while it computes


class CaptionDataModule(L.LightningDataModule):
    """Training batches with labels; validation as prompts to caption and as labelled batches for the loss; any split as prompts.

    Args:
        clips: Split name to clips.
        make_dataset: Clips to samples, decoded or out of the cache.
        train_collator: Makes labelled batches.
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
        self._resume_epoch, self._resume_batches = 0, 0

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled by seed and epoch; after a resume the first pass starts where the checkpoint stood."""
        settings, clips = self.settings, self.clips["train"]
        sampler = self._sampler(clips, is_training=True)
        sampler.set_epoch(self._resume_epoch)
        sampler.skip(self._resume_batches * settings.batch_size)
        self._resume_epoch = self._resume_batches = 0
        return self._loader(clips, sampler, self.train_collator, settings.batch_size)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The clips to caption while training, then the same clips with labels for the loss."""
        clips, size = self.clips["val"][: self.settings.max_eval_clips], self.settings.eval_batch_size
        return [self._eval_loader(clips, collator, size) for collator in (self.prompt_collator, self.train_collator)]

    def prompt_loader(self, split: str) -> DataLoader[Any]:
        """Every clip of a split once, as prompts."""
        return self._eval_loader(self.clips[split], self.prompt_collator, self.settings.eval_batch_size)

    def resume_at(self, epoch: int, batches: int) -> None:
        """Makes the next training loader start in `epoch` after `batches` batches of this rank."""
        self._resume_epoch, self._resume_batches = epoch, batches

    def _eval_loader(self, clips: Sequence[Clip], collator: Collator, batch_size: int) -> DataLoader[Any]:
        return self._loader(clips, self._sampler(clips, is_training=False), collator, batch_size)

    def _loader(self, clips: Sequence[Clip], sampler: ResumableSampler, collator: Collator, batch_size: int) -> DataLoader[Any]:
        workers = self.settings.num_workers
        return DataLoader(
            self.make_dataset(clips),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
            generator=torch.Generator(),  # of workers' seeds: drawn from the global one, they would make a resumed run another
            persistent_workers=workers > 0,
            pin_memory=self.settings.pin_memory,
        )

    def _sampler(self, clips: Sequence[Clip], *, is_training: bool) -> ResumableSampler:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return ResumableSampler(len(clips), shuffle=is_training, pad=is_training, seed=self.settings.seed, rank=rank, world_size=world_size)
