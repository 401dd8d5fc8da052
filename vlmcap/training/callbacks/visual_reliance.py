"""Measures visual reliance: validation again with the videos exchanged between clips, and with black videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

from vlmcap.assembly.clips import blank_clip
from vlmcap.config import Config, Engine, VisualRelianceConfig, VisualRelianceMode
from vlmcap.data.loading.datamodule import CaptionDataModule
from vlmcap.errors import UserError
from vlmcap.terminal import progress_reporter
from vlmcap.training.callbacks.evaluation import CaptionEvaluation, log_scores
from vlmcap.training.callbacks.progress import print_line
from vlmcap.training.callbacks.visual_reliance_scores import (
    BLANKED,
    OWN,
    SWAPPED,
    Observation,
    VisualReliance,
    compare,
    swap_order,
    write_visual_reliance,
)
from vlmcap.training.module import CaptioningModule
from vlmcap.training.random_state import random_states, set_random_states
from vlmcap.types import Clip, Sample


class VisualRelianceCheck(L.Callback):
    """Measures how much captions and label loss degrade without the right video; must come after `CaptionEvaluation`.

    The measurement does not affect training: it restores the random states, counts no bad clips and computes no
    gradients.

    Args:
        settings: Frequency, mode and number of clips.
        evaluation: Callback with the captions of the original videos; it receives the scores.
        data: Data module that turns clips into samples.
        folder: Folder that receives a file for each measurement.
        blank: Clip of black frames; its captions are not used.
        seed: Seed of the exchange, which is the same in every measurement.
        max_clips: Number of validation clips that are captioned while training.
    """

    def __init__(
        self,
        settings: VisualRelianceConfig,
        evaluation: CaptionEvaluation,
        data: CaptionDataModule,
        folder: Path,
        *,
        blank: Clip,
        seed: int,
        max_clips: int,
    ) -> None:
        self.settings, self.evaluation, self.data, self.folder = settings, evaluation, data, folder
        self.blank, self.seed, self.max_clips = blank, seed, max_clips

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures on the validation clips if a measurement is due."""
        if trainer.sanity_checking:
            return
        epoch = trainer.current_epoch
        # Counted by epochs, so that a resumed run measures at the same validations.
        number = (epoch + 1) // (trainer.check_val_every_n_epoch or 1)
        if number % self.settings.every_n_validations == 0:
            self._measure_split(trainer, pl_module, "val", f"val-epoch={epoch:02d}")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures on the first clips of the scored split."""
        self._measure_split(trainer, pl_module, self.evaluation.split, self.evaluation.split)

    def _measure_split(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str, name: str) -> None:
        assert isinstance(pl_module, CaptioningModule)
        # The first clips, like the validation of the training loop, whose captions are reused.
        clips = list(self.data.clips[split][: min(self.settings.max_clips, self.max_clips)])
        if len(clips) < 2:
            return
        # Each clip gets another clip's video. Sampled captions draw random numbers, but training must not notice.
        order = swap_order(clips, self.seed)
        states = random_states()
        try:
            waiting = (
                progress_reporter(f"measuring visual reliance on the {split} split")
                if trainer.is_global_zero
                else nullcontext()
            )
            # `forward_context` is Lightning's autocast, which a callback does not run in.
            with torch.no_grad(), trainer.precision_plugin.forward_context(), waiting:
                seen = self._gather(_Measurement(self, pl_module).run(clips, order))
        finally:
            set_random_states(states)
        # All ranks have all observations, so all log the same scores; the first one writes the files.
        result = compare(clips, order, seen, self.evaluation.scorer)
        if result is not None:
            self._publish(trainer, pl_module, split, name, result)

    def _gather(self, seen: list[Observation]) -> list[Observation]:
        by_rank = [seen]
        if dist.is_available() and dist.is_initialized():
            by_rank = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(by_rank, seen)
        return [observation for observations in by_rank for observation in observations]

    def _publish(
        self, trainer: L.Trainer, pl_module: L.LightningModule, split: str, name: str, result: VisualReliance
    ) -> None:
        scores = {f"{split}/{score}": value for score, value in result.named().items()}
        self.evaluation.scores |= scores
        log_scores(trainer, pl_module, scores)
        if not trainer.is_global_zero:
            return
        write_visual_reliance(self.folder / f"{name}.jsonl", result)
        print_line(trainer, f"{split}, {len(result.clips)} clips: {result.sentence()}")
        if result.is_blind:
            print_line(
                trainer,
                f"Warning: {split}: the captions do not depend on the video; another clip's video works as well.",
            )


class _Measurement:
    """One measurement on this rank.

    Args:
        check: Callback with settings and data.
        module: Module in evaluation mode.
    """

    def __init__(self, check: VisualRelianceCheck, module: CaptioningModule) -> None:
        self.data, self.blank, self.module = check.data, check.blank, module
        self.has_captions = check.settings.mode is VisualRelianceMode.captions
        self.captions = {prediction.clip.id: prediction.text for prediction in check.evaluation.predictions}
        self.rank, self.world_size = check.data.evaluation_rank

    def run(self, clips: Sequence[Clip], order: Sequence[int]) -> list[Observation]:
        """Returns the observations of this rank's clips with the own, the swapped and the black video."""
        # A clip keeps its id and captions, and takes only the video of the other one.
        swapped = [
            replace(clip, video=clips[other].video, frames=clips[other].frames)
            for clip, other in zip(clips, order, strict=True)
        ]
        # The captions of the own videos are those that were scored just now.
        observed = self._measure(
            OWN, self._samples(clips), lambda samples: [self.captions.get(sample.clip.id, "") for sample in samples]
        )
        return [
            *observed,
            *self._measure(SWAPPED, self._samples(swapped), self._caption),
            # The loaders of the other two conditions give each rank its share of the clips; here it is cut by hand.
            *self._measure(BLANKED, self._black_samples(clips[self.rank :: self.world_size]), self._caption_once),
        ]

    def _samples(self, clips: Sequence[Clip]) -> Iterator[list[Sample]]:
        for items in self.data.sample_loader(clips):
            yield [item for item in items if isinstance(item, Sample)]

    def _black_samples(self, clips: Sequence[Clip]) -> Iterator[list[Sample]]:
        """Yields the clips with the black video, which is read once."""
        black = self.data.make_dataset([self.blank])[0]
        assert isinstance(black, Sample), "the black picture is generated by this package"
        yield [replace(black, clip=clip) for clip in clips]

    def _measure(
        self, condition: str, batches: Iterator[list[Sample]], write: Callable[[list[Sample]], list[str]]
    ) -> list[Observation]:
        seen = []
        for samples in batches:
            # None for every clip if only the loss is measured.
            texts: Sequence[str | None] = write(samples) if self.has_captions and samples else [None] * len(samples)
            for sample, text in zip(samples, texts, strict=True):
                batch = self.data.train_collator([sample])  # one clip per batch, for the loss of each clip
                if len(batch):
                    loss, num_tokens = self.module.captioner(batch.to(self.module.device))
                    seen.append(Observation(condition, sample.clip.id, float(loss), num_tokens, text))
        return seen

    def _caption(self, samples: list[Sample]) -> list[str]:
        return self.module.captioner.generate(self.data.prompt_collator(samples).to(self.module.device))

    def _caption_once(self, samples: list[Sample]) -> list[str]:
        """Generates one caption for all samples, which share video and prompt, unless captions are sampled."""
        if self.module.captioner.generation.rules.do_sample:
            return self._caption(samples)
        # Greedy and beam search give the same caption for the same input.
        return self._caption(samples[:1]) * len(samples)


def visual_reliance_check(
    config: Config, data: CaptionDataModule, evaluation: CaptionEvaluation, folder: Path
) -> VisualRelianceCheck | None:
    """Builds the callback that measures visual reliance, or returns None if it is disabled.

    Raises:
        UserError: The language model runs in vLLM, which returns no loss.
    """
    if not config.callbacks.visual_reliance.enabled:
        return None
    if config.evaluation.engine is Engine.vllm:
        raise UserError(
            "callbacks.visual_reliance measures the loss of labels, which evaluation.engine=vllm does not return; "
            "set callbacks.visual_reliance.enabled=false, or evaluation.engine=native"
        )

    return VisualRelianceCheck(
        config.callbacks.visual_reliance,
        evaluation,
        data,
        folder / "predictions" / "visual_reliance",
        blank=blank_clip(config),
        seed=config.seed,
        max_clips=config.evaluation.max_clips,
    )
