"""A whole training run in a second.

The true data module, module, trainer and checkpoints around a captioner of a thousand weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vlmcap.config import Batching, Config, DataConfig, OptimConfig, Stage
from vlmcap.data.loading.batches import Draw
from vlmcap.data.loading.collate import Collator
from vlmcap.data.loading.datamodule import CaptionDataModule
from vlmcap.data.loading.lengths import count_tokens, sequence_lengths
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.training.callbacks.saving import AtomicCheckpointIO, checkpoint_callbacks
from vlmcap.training.module import CaptioningModule
from vlmcap.training.schedule import StagePlan
from vlmcap.types import Batch, Clip, Sample

NUM_CLIPS, NUM_VISUAL, MAX_CAPTION = 26, 4, 24
WIDTH = 8


@dataclass
class LetterPrompt:
    """A token a letter, ids below 32."""

    prefix_ids: list[int] = field(default_factory=lambda: [2, 3])
    suffix_ids: list[int] = field(default_factory=lambda: [4])
    end_id: int = 1
    pad_id: int = 0

    def encode_caption(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 5 for letter in text]


class NoisyFeatures(Dataset[Sample]):
    """Features that are drawn anew in each epoch, as frames sampled at random would be."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | Draw) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        noise = np.random.default_rng([0, epoch, index]).normal(size=(2, NUM_VISUAL // 2, WIDTH))
        return Sample(self.clips[index], features=torch.from_numpy(noise.astype(np.float32)))


class TinyCaptioner(nn.Module):
    """A bag of words after dropout: as much of a `VideoCaptioner` as training asks for."""

    encoder = None

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.llm = nn.Sequential(nn.Embedding(32, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 32))

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        assert batch.labels is not None
        assert batch.features is not None
        clips = self.projector(batch.features).mean(dim=(1, 2))
        visual = clips[:, None] if batch.position_ids is None else clips[(batch.position_ids == 0).cumsum(dim=1) - 1]
        embedded = self.llm[0](batch.input_ids) + visual
        logits = self.llm[2](self.llm[1](embedded))[:, :-1]
        labels = batch.labels[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, int((labels != -100).sum())

    def with_features(self, batch: Batch) -> Batch:
        return batch

    def generate(self, batch: Batch) -> list[str]:
        return ["a"] * len(batch)


def tiny_clips(count: int = NUM_CLIPS) -> list[Clip]:
    """Clips with captions of 1 to 30 letters; some are cut."""
    rng = np.random.default_rng(7)
    letters = [
        "".join(chr(ord("a") + int(letter)) for letter in rng.integers(0, 26, rng.integers(1, 31)))
        for _ in range(count)
    ]
    return [Clip(f"clip{index}", f"clip{index}.mp4", (caption,)) for index, caption in enumerate(letters)]


def tiny_data(
    clips: Sequence[Clip] | None = None,
    *,
    batching: str = "shuffled",
    max_eval_clips: int = 10,
    seed: int = 5,
    **settings: Any,
) -> CaptionDataModule:
    """26 training clips and 5 to validate, unless `clips` are given for both; `settings` are those of `DataConfig`."""
    train = tiny_clips() if clips is None else clips
    prompt = LetterPrompt()
    collator = Collator(prompt, NUM_VISUAL, MAX_CAPTION)
    lengths = sequence_lengths(
        count_tokens(train, prompt.encode_caption),
        max_caption_tokens=MAX_CAPTION,
        prompt_tokens=len(prompt.prefix_ids) + len(prompt.suffix_ids),
        visual_tokens=NUM_VISUAL,
    )
    return CaptionDataModule(
        {"train": train, "val": train[:5] if clips is None else clips},
        NoisyFeatures,
        collator,
        replace(collator, mode="generate"),
        DataConfig(
            **{"batch_size": 3, "eval_batch_size": 4, "num_workers": 0, "batching": Batching[batching], **settings}
        ),
        prompt_batch_size=4,
        seed=seed,
        max_eval_clips=max_eval_clips,
        lengths=lengths,
    )


def tiny_training(
    folder: Path,
    data: CaptionDataModule,
    *,
    num_epochs: int,
    monitor: str | None = None,
    stages: Any = None,
    **trainer: Any,
) -> tuple[L.Trainer, CaptioningModule]:
    """Trainer and module, checkpoints in `folder / "checkpoints"` every two steps of two micro-batches."""
    L.seed_everything(11, verbose=False)
    stages = stages or {"tune": Stage(epochs=num_epochs, projector_lr=0.02, llm_lr=0.01)}
    module = CaptioningModule(
        cast(VideoCaptioner, TinyCaptioner()),
        StagePlan(stages),
        OptimConfig(),
        identity={"config": {}},
        skipped_log=SkippedClipLog(folder / "skipped_clips.jsonl", 0.0, NUM_CLIPS),
        max_label_tokens=3 * MAX_CAPTION,
    )
    config = SimpleNamespace(
        trainer=SimpleNamespace(checkpoint_every_n_steps=2),
        monitor=monitor,
        monitor_mode="min" if monitor == "val/loss" else "max",
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": num_epochs,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "plugins": [AtomicCheckpointIO()],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "deterministic": True,
        "default_root_dir": folder,
    }
    callbacks = [*checkpoint_callbacks(folder, cast(Config, config)), *trainer.pop("callbacks", [])]
    return L.Trainer(**{**settings, **trainer}, callbacks=callbacks), module
