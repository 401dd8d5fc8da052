"""Records that data, models and training pass to each other.

Legend: B clips, R rows, F frames (tiles of a frame count as frames), P patches per frame, Dv vision width, V visual
tokens per clip, S sequence (visual tokens included), T label tokens, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GridTHW = tuple[int, int, int]
"""Size of one clip in patches: frames (times tiles), patch rows, patch columns."""

FrameTimes = tuple[float, ...]
"""Seconds from a clip's first frame to each decoded frame, ascending; a repeated frame repeats its time."""

CLOCKLESS_FPS = 2.0
"""Frames per second that are assumed for clips without timestamps: an image, an animation or a list of images."""

VisualLayout = Callable[[GridTHW | None, FrameTimes | None], Sequence[int | Sequence[int]]]
"""Maps a clip's size and frame times to the content of its video in the prompt.

The size is None for the encoder's fixed grid, the times are None for `CLOCKLESS_FPS`. Of the result, an int is a number
of placeholders, and a sequence holds ids of text between them.
"""

IGNORED = -100
"""Label of positions that the loss ignores."""

_BATCHED = ("input_ids", "attention_mask", "frames", "features")


@dataclass(frozen=True, slots=True)
class Clip:
    """One entry of a data set: a video, an image or a list of images, with its captions.

    Attributes:
        id: Identifier that is unique within the split; the stem of the label file for AI Hub data.
        video: Path or address of the video or image; a member of an archive is `zip://MEMBER::ARCHIVE` or
            `tar://MEMBER::ARCHIVE`.
        captions: Reference captions, at least one; empty only for captioning without references.
        category: Free label by which scores are broken down; empty if unknown.
        frames: Image files of the frames, in order, if the clip is a list of images; `video` is then the first of them.
    """

    id: str
    video: str
    captions: tuple[str, ...]
    category: str = ""
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A clip that could not be read; takes the place of its `Sample`.

    Attributes:
        clip: The clip.
        reason: One sentence that says why.
        is_final: False if another attempt may succeed, after a timeout or a killed decoder.
    """

    clip: Clip
    reason: str
    is_final: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip ready for the model; exactly one of `frames` and `features` is set.

    Attributes:
        clip: Entry of the data set.
        frames: uint8 (F, 3, H, W), resized for the encoder; (F, P, 3 · p · p), split into patches, if sizes vary.
        features: (F, P, Dv), patch features of the frozen encoder from the cache.
        grid_thw: Frames, patch rows and patch columns if any of them varies between clips; None for the encoder's fixed
            grid.
        times_s: Times of the decoded frames, before the encoder joins any of them; None if unknown.
    """

    clip: Clip
    frames: Tensor | None = None
    features: Tensor | None = None
    grid_thw: GridTHW | None = None
    times_s: FrameTimes | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of B clips in R rows; ids, labels and masks share one length S, the visual placeholders included.

    Positions are stored as indices, row · S + column, into the flattened rows, and counts as Python ints. Masks
    would have to be counted on the device, which the host would wait for.

    Each clip has its own row, R = B, unless the batch is packed: then one row, R = 1, holds all clips without padding.
    Frames, features and sizes are always indexed by clip, in the order of the rows.

    Attributes:
        clips: The B clips, in the order of rows and of positions in a row.
        input_ids: int64 (R, S), with the padding id at placeholders.
        attention_mask: int64 (R, S), 1 on real tokens, 0 on padding.
        visual_indices: int64 (sum of V,), indices of the projected visual tokens, clip after clip.
        num_visual: V of each clip.
        lengths: Number of real tokens of each clip.
        targets: int64 (T,), the tokens of the loss: the caption and its end token; None for generation.
        label_indices: int64 (T,), indices of the preceding tokens, which predict the targets; None for generation.
        frames: uint8 (B, F, 3, H, W), or (B, F, P, 3 · p · p) if grids vary, or None.
        features: (B, F, P, Dv) or None.
        grid_thw: Size of each clip if sizes vary; frames and features are then zero-padded at the end of F and P.
        times_s: Frame times of each clip, None for a clip without; empty if no clip has any.
        position_ids: int64 (R, S) of a packed batch, restarting at 0 for each clip; None if each clip has its own row.
        is_right_padded: Whether all padding follows the clips of a row, so that causal attention needs no mask.
        skipped: Clips of this batch that could not be read.
        num_truncated: Number of captions in this batch that were truncated to the limit.
    """

    clips: tuple[Clip, ...]
    input_ids: Tensor
    attention_mask: Tensor
    visual_indices: Tensor
    num_visual: tuple[int, ...]
    lengths: tuple[int, ...]
    targets: Tensor | None
    label_indices: Tensor | None
    frames: Tensor | None = None
    features: Tensor | None = None
    grid_thw: tuple[GridTHW, ...] | None = None
    times_s: tuple[FrameTimes | None, ...] = ()
    position_ids: Tensor | None = None
    is_right_padded: bool = False
    skipped: tuple[Skipped, ...] = ()
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def num_label_tokens(self) -> int:
        """T, the number of tokens in the loss."""
        return 0 if self.targets is None else len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Number of real tokens of all clips."""
        return sum(self.lengths)

    @property
    def visual_mask(self) -> Tensor:
        """Mask of visual tokens, bool (R, S)."""
        flat = self.input_ids.new_zeros(self.input_ids.numel())
        return flat.index_fill(0, self.visual_indices, 1).view(self.input_ids.shape).bool()  # (R · S,) -> (R, S)

    @property
    def labels(self) -> Tensor | None:
        """Labels, int64 (R, S), -100 outside the caption and its end token; None for generation."""
        if self.targets is None or self.label_indices is None:
            return None
        flat = self.input_ids.new_full((self.input_ids.numel(),), IGNORED)
        return flat.index_copy(0, self.label_indices + 1, self.targets).view(self.input_ids.shape)  # (R · S,) -> (R, S)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Returns the batch with its tensors on `device`; Lightning cannot move the fields of a frozen dataclass."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory; the data loader calls this for batches that go to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def select(self, indices: Sequence[int]) -> Batch:
        """Returns a batch of prompts with the clips at `indices`, without the skipped clips."""
        import torch

        assert self.targets is None, "only prompts can be selected, not clips with targets"
        changed: dict[str, Any] = {
            name: select_entries(value, indices) for name in _BATCHED if (value := getattr(self, name)) is not None
        }
        by_clip, width = self.visual_indices.split(self.num_visual), self.input_ids.shape[1]
        # A clip that moves from row `old` to row `new` moves its indices by whole rows.
        visual_indices = torch.cat([by_clip[old] + (new - old) * width for new, old in enumerate(indices)])
        grids = None if self.grid_thw is None else tuple(self.grid_thw[index] for index in indices)
        times_s = tuple(self.times_s[index] for index in indices) if self.times_s else ()
        clips = tuple(self.clips[index] for index in indices)
        changed |= {name: tuple(getattr(self, name)[index] for index in indices) for name in ("num_visual", "lengths")}
        changed |= {"visual_indices": visual_indices, "clips": clips, "grid_thw": grids, "times_s": times_s}
        return replace(self, **changed, skipped=(), num_truncated=0)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = (*_BATCHED, "visual_indices", "targets", "label_indices", "position_ids")
        changed: dict[str, Any] = {name: change(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **changed)


def select_entries(values: Tensor, indices: Sequence[int]) -> Tensor:
    """Returns the entries of a tensor at some indices of its first dimension, in its own dtype.

    Autocast is disabled, as with bfloat16 it refuses to stack float16 features.
    """
    import torch

    with torch.autocast(values.device.type, enabled=False):
        return torch.stack([values[index] for index in indices])


@dataclass(frozen=True, slots=True)
class ValidationBatch:
    """Clips that are read and encoded once, both for generating captions and for the loss.

    Attributes:
        prompts: All clips with their frames or features, as prompts.
        labelled: Clips with a reference caption, in small batches without frames or features.
        is_captioned: Whether captions are generated; False computes the loss only.
    """

    prompts: Batch
    labelled: tuple[Batch, ...]
    is_captioned: bool = True

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Clips that could not be read or have no reference caption."""
        return tuple(skipped for batch in (self.prompts, *self.labelled) for skipped in batch.skipped)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> ValidationBatch:
        """Like `Batch.to`."""
        return self._map(lambda batch: batch.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ValidationBatch:
        """Like `Batch.pin_memory`."""
        return self._map(lambda batch: batch.pin_memory())

    def _map(self, change: Callable[[Batch], Batch]) -> ValidationBatch:
        return replace(self, prompts=change(self.prompts), labelled=tuple(map(change, self.labelled)))
