"""Data sets of decoded clips, the plan of their features, and batches of any video files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.assembly.base_checkpoints import BaseCheckpoints
from vlmcap.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from vlmcap.data.loading.clip_dataset import ClipDataset
    from vlmcap.models.encoders import VisionEncoder
    from vlmcap.models.llm.prompt import PromptEncoder
    from vlmcap.types import Batch, Clip, GridTHW, VisualLayout


def decoded_dataset(
    config: Config,
    transform: Callable[[Tensor], Tensor],
    grid_of: Callable[[int, int, int], GridTHW | None],
    clips: Sequence[Clip],
) -> ClipDataset:
    """Builds a data set of clips with decoded frames.

    Args:
        config: Run configuration.
        transform: Transform from decoded frames to the frames of the encoder; a picklable dataclass.
        grid_of: See `FeaturePlan`.
        clips: Clips in the order of the data set.
    """
    from vlmcap.data.loading.clip_dataset import ClipDataset

    return ClipDataset(clips, config.data, seed=config.seed, frame_transform=transform, grid_of=grid_of)


@dataclass(frozen=True, slots=True)
class FeaturePlan:
    """Everything that the features of a configuration depend on.

    Attributes:
        config: Run configuration, as `prepare` returned it.
        base_checkpoints: Base checkpoints, including that of the encoder.
        meta_encoder: Encoder on the meta device.
        grid_of: Function `(F, H, W)` of decoded frames that returns a clip's size in patches, or None if all clips have
            the grid of the encoder.
        num_visual_tokens: V, the largest number of visual tokens of a clip; 0 if features are not used here.
    """

    config: Config
    base_checkpoints: BaseCheckpoints
    meta_encoder: VisionEncoder
    grid_of: Callable[[int, int, int], GridTHW | None]
    num_visual_tokens: int = 0

    def decoded(self, clips: Sequence[Clip]) -> ClipDataset:
        """Builds a data set of clips with the frames of the encoder."""
        return decoded_dataset(self.config, self.meta_encoder.transform, self.grid_of, clips)


def grid_of_frames(config: Config, encoder: VisionEncoder) -> Callable[[int, int, int], GridTHW | None]:
    """Returns the function `grid_of` of a `FeaturePlan`."""
    from vlmcap.models.encoders.preprocessing import StatedGrid

    grid_of = encoder.transform.grid_thw
    # With a varying number of frames, the number must travel with each clip, even if rows and columns are fixed.
    return StatedGrid(grid_of, encoder.grid) if config.data.variable_frames else grid_of


@dataclass(frozen=True, slots=True)
class PathReader:
    """The `ClipReader` of a captioner: decodes video files in data workers into batches of prompts.

    Attributes:
        plan: Feature plan, with the configuration and the transform of frames.
        prompt: Encoder of the text around the visual tokens.
        visual: See `Assembly`.
    """

    plan: FeaturePlan
    prompt: PromptEncoder
    visual: VisualLayout

    def __call__(self, paths: Sequence[str | Path], batch_size: int) -> Iterator[Batch]:
        """Yields batches of up to `batch_size` clips on the CPU, in the order of the paths.

        Raises:
            UserError: A data worker died.
        """
        from torch.utils.data import DataLoader

        from vlmcap.data.loading.collate import Collator
        from vlmcap.data.loading.worker_report import WorkerWatch, worker_options
        from vlmcap.types import Clip

        data, llm = self.plan.config.data, self.plan.config.llm
        # The position is the id, as paths may repeat; there are no captions, because these clips are only captioned.
        clips = [Clip(id=str(index), video=str(path), captions=()) for index, path in enumerate(paths)]
        dataset = self.plan.decoded(clips)
        collator = Collator(self.prompt, self.visual, llm.caption_tokens, mode="generate")
        # Starting a worker takes longer than decoding one clip, so a single clip is read in this process.
        num_workers = max(0, min(data.num_workers, len(clips) - 1))
        watch = WorkerWatch()
        watched = watch.watch(dataset, clips) if num_workers else dataset
        with watch.as_user_errors():
            options = worker_options(num_workers, batch_size, data.decode_timeout_s)
            is_pinned = self.plan.config.hardware.accelerator != "cpu"
            yield from DataLoader(watched, batch_size=batch_size, collate_fn=collator, pin_memory=is_pinned, **options)
