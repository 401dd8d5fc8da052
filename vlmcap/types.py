"""Records that travel between data, models and training.

Legend: B clips, R rows, F frames (tiles of a frame count as frames), P patches a frame, Dv vision width, V visual
tokens of a clip, S sequence (visual tokens included), T label tokens, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GridTHW = tuple[int, int, int]
"""Size of one clip in patches: frames (times tiles), rows, columns."""

FrameTimes = tuple[float, ...]
"""Seconds from a clip's first frame to each decoded one, ascending; a repeated frame repeats its time."""

CLOCKLESS_FPS = 2.0
"""Images per second of a clip that has no clock: an image, an animation or a list of images."""

VisualLayout = Callable[[GridTHW | None, FrameTimes | None], Sequence[int | Sequence[int]]]
"""From a clip's size, or None for the encoder's own, and its frames' times, or None for `CLOCKLESS_FPS`, to what stands at the place of
its video: numbers of placeholders, and ids of text."""


IGNORED = -100
"""Label of positions that the loss passes over."""

_OF_ROWS = ("input_ids", "attention_mask", "frames", "features")


@dataclass(frozen=True, slots=True)
class Clip:
    """One entry of a data set: a video, an image or a list of images, and what people said about it.

    Attributes:
        id: Unique within its split; the label file's stem for AI Hub data.
        video: Path or address of the video or image; a member of an archive is `zip://MEMBER::ARCHIVE` or
            `tar://MEMBER::ARCHIVE`.
        captions: Reference captions, at least one; empty only for captioning without references.
        category: Free label for break-downs, empty when unknown.
        frames: Images that are the frames of the clip, in order, where it is no video; `video` is then the first of
            them.
    """

    id: str
    video: str
    captions: tuple[str, ...]
    category: str = ""
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A clip that could not be read, and why: takes the place of its `Sample`.

    Attributes:
        clip: The clip.
        reason: One sentence.
        is_final: False where another try may go better: it took too long, or the system took the decoder away.
    """

    clip: Clip
    reason: str
    is_final: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip ready for the model; exactly one of `frames` and `features` is set.

    Attributes:
        clip: Where it comes from.
        frames: uint8 (F, 3, H, W), already resized for the encoder; (F, P, 3 · p · p), cut into patches, where sizes
            vary.
        features: (F, P, Dv), patch features of the frozen encoder out of the cache.
        grid_thw: Frames, patch rows and columns where any of them varies from clip to clip; None where they are the
            encoder's own.
        times_s: Times of the frames as they were decoded, before the encoder joins any of them; None where they are not
            known.
    """

    clip: Clip
    frames: Tensor | None = None
    features: Tensor | None = None
    grid_thw: GridTHW | None = None
    times_s: FrameTimes | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of B clips in R rows; ids, labels and masks share one length S, the visual placeholders included.

    Where something stands in the rows is said by places, and how many there are by plain numbers, as the host would
    have to wait for a device that holds masks to count them. A place is an index into the rows laid end to end, row · S
    + column.

    A clip has a row of its own, R = B, unless the batch is packed: all clips then stand in one row, R = 1, one behind
    another and without padding. Frames, features and sizes always go by clip, in the order in which the clips stand in
    the rows.

    Attributes:
        clips: The B clips, in the order of rows and of places in a row.
        input_ids: int64 (R, S); placeholder positions hold the padding id.
        attention_mask: int64 (R, S); 1 on real tokens, 0 on padding.
        visual_places: int64 (sum of V,); where projected visual tokens go, in the order of clips.
        num_visual: V of each clip.
        lengths: Real tokens of each clip.
        targets: int64 (T,), the tokens that the loss counts: the caption and its end token; None for generation.
        label_places: int64 (T,); places of the tokens in front of them, which predict them; None for generation.
        frames: uint8 (B, F, 3, H, W), or (B, F, P, 3 · p · p) where patches vary, or None.
        features: (B, F, P, Dv) or None.
        grid_thw: A clip each, where they vary; frames and features are then padded with zeros at the end of F and of P.
        times_s: Times of each clip's frames, None where they are not known; empty where they are known of no clip.
        position_ids: int64 (R, S), from 0 anew for each clip, of a packed batch; None where a clip has a row of its
            own.
        is_right_padded: Whether all padding stands behind the clips of a row, so that causal attention needs no mask.
        skipped: Clips of this batch that could not be read.
        num_truncated: Captions cut to the limit in this batch.
    """

    clips: tuple[Clip, ...]
    input_ids: Tensor
    attention_mask: Tensor
    visual_places: Tensor
    num_visual: tuple[int, ...]
    lengths: tuple[int, ...]
    targets: Tensor | None
    label_places: Tensor | None
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
        """T, the tokens that the loss counts."""
        return 0 if self.targets is None else len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Real tokens of all clips."""
        return sum(self.lengths)

    @property
    def visual_mask(self) -> Tensor:
        """Bool (R, S); True where a projected visual token goes."""
        flat = self.input_ids.new_zeros(self.input_ids.numel())
        return flat.index_fill(0, self.visual_places, 1).view(self.input_ids.shape).bool()  # (R · S,) -> (R, S)

    @property
    def labels(self) -> Tensor | None:
        """int64 (R, S); -100 outside the caption and its end token; None for generation."""
        if self.targets is None or self.label_places is None:
            return None
        flat = self.input_ids.new_full((self.input_ids.numel(),), IGNORED)
        return flat.index_copy(0, self.label_places + 1, self.targets).view(self.input_ids.shape)  # (R · S,) -> (R, S)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The batch with its tensors on `device`; Lightning calls this, as it cannot look into a frozen record."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the data loader calls this for batches that go to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def part(self, rows: Sequence[int]) -> Batch:
        """The prompts of some of its rows; what could not be read stays with the whole."""
        import torch

        assert self.targets is None, "prompts are taken apart, and labelled batches are not"
        changed: dict[str, Any] = {
            name: rows_of(value, rows) for name in _OF_ROWS if (value := getattr(self, name)) is not None
        }
        own, width = self.visual_places.split(self.num_visual), self.input_ids.shape[1]
        places = torch.cat([own[row] + (place - row) * width for place, row in enumerate(rows)])
        grids = None if self.grid_thw is None else tuple(self.grid_thw[row] for row in rows)
        times_s = tuple(self.times_s[row] for row in rows) if self.times_s else ()
        clips = tuple(self.clips[row] for row in rows)
        changed |= {name: tuple(getattr(self, name)[row] for row in rows) for name in ("num_visual", "lengths")}
        changed |= {"visual_places": places, "clips": clips, "grid_thw": grids, "times_s": times_s}
        return replace(self, **changed, skipped=(), num_truncated=0)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = (*_OF_ROWS, "visual_places", "targets", "label_places", "position_ids")
        changed: dict[str, Any] = {name: change(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **changed)


def rows_of(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, in its own type.

    Autocast would refuse to stack float16 features where it computes in bfloat16.
    """
    import torch

    with torch.autocast(values.device.type, enabled=False):
        return torch.stack([values[row] for row in rows])


@dataclass(frozen=True, slots=True)
class ValidationBatch:
    """Clips that are read and encoded once, for their captions and for their loss.

    Attributes:
        prompts: The clips with their frames or features, as prompts.
        labelled: Those with a caption to compare with, a few in each batch, without frames or features.
        is_captioned: False where the loss alone is asked for.
    """

    prompts: Batch
    labelled: tuple[Batch, ...]
    is_captioned: bool = True

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Clips that could not be read, or have nothing to compare with."""
        return tuple(skipped for batch in (self.prompts, *self.labelled) for skipped in batch.skipped)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> ValidationBatch:
        """As `Batch.to`."""
        return self._map(lambda batch: batch.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ValidationBatch:
        """As `Batch.pin_memory`."""
        return self._map(lambda batch: batch.pin_memory())

    def _map(self, change: Callable[[Batch], Batch]) -> ValidationBatch:
        return replace(self, prompts=change(self.prompts), labelled=tuple(map(change, self.labelled)))
