"""Collation of samples into batches: the prompt around the visual tokens, followed by the caption.

Legend: B clips, R rows of a batch, F frames, P patches per frame, Dv vision width, V visual tokens per clip, S sequence
length, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vlmcap.types import IGNORED, Batch, Clip, FrameTimes, GridTHW, Sample, Skipped, ValidationBatch, VisualLayout


class PromptEncoder(Protocol):
    """The interface of a tokenizer with its chat template that the collator uses."""

    @property
    def prefix_ids(self) -> Sequence[int]:
        """Tokens before the visual tokens."""
        ...

    @property
    def suffix_ids(self) -> Sequence[int]:
        """Tokens between the visual tokens and the caption."""
        ...

    @property
    def end_id(self) -> int:
        """The token that ends a caption."""
        ...

    @property
    def pad_id(self) -> int:
        """The token for padding and visual placeholders; it may equal `end_id`."""
        ...

    def encode_caption(self, text: str) -> list[int]:
        """Returns the tokens of a caption, without the end token."""
        ...


@dataclass(frozen=True, slots=True)
class _Sequence:
    """The segments of a clip's sequence.

    They are joined and never searched for later, so no label can be lost to a tokenization mismatch.
    """

    sample: Sample
    prompt: tuple[int, ...]
    is_visual: tuple[bool, ...]
    caption: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.caption)


@dataclass
class Collator:
    """Turns a list of samples into a `Batch`; picklable if `prompt` is.

    Train: prefix, V placeholders, suffix, caption, end token, padded on the right; the first caption of a clip is the
    target. With packing, all clips follow one another in a single row without padding, and positions restart at each
    clip, which is how the model keeps them apart.
    Generate: prefix, V placeholders, suffix, padded on the left, so that every row ends where generation continues;
    labels are None.

    Attributes:
        prompt: Token ids of the prompt's segments.
        visual: V, never truncated; if clips differ, a picklable function of a clip's size and times.
        max_caption_tokens: Longest caption, end token included; a longer one is truncated without an end token, so the
            model does not learn to stop there.
        mode: "train" or "generate".
        is_packed: Whether training batches are packed; prompts for generation never are.

    Raises:
        ValueError: A number or the mode is out of its range.
    """

    prompt: PromptEncoder
    visual: int | VisualLayout
    max_caption_tokens: int
    mode: Literal["train", "generate"] = "train"
    is_packed: bool = False

    def __post_init__(self) -> None:
        if (isinstance(self.visual, int) and self.visual < 0) or self.max_caption_tokens < 1:
            raise ValueError(
                f"visual must be at least 0 and max_caption_tokens at least 1, not {self.visual} and "
                f"{self.max_caption_tokens}"
            )
        if self.mode not in ("train", "generate"):
            raise ValueError(f"mode must be 'train' or 'generate', not '{self.mode}'")

    def __call__(self, items: Sequence[Sample | Skipped]) -> Batch:
        """Collates the usable samples; if there are none, B is 0 and S is the length of the bare prompt."""
        # 1. A sequence of token ids per clip; a clip without a caption has no loss and is skipped.
        skipped = [item for item in items if isinstance(item, Skipped)]
        sequences: list[_Sequence] = []
        num_truncated = 0
        for item in items:
            if isinstance(item, Skipped):
                continue
            caption = self._caption_ids(item.clip)
            if self.mode == "train" and not caption:
                skipped.append(
                    Skipped(
                        item.clip, f"clip {item.clip.id} has no caption to learn from: it is empty or gives no tokens"
                    )
                )
                continue
            num_truncated += len(caption) > self.max_caption_tokens
            sequences.append(
                _Sequence(item, *self._prompt(item.grid_thw, item.times_s), caption[: self.max_caption_tokens])
            )
        # 2. Pad the sequences, and the frames or features, to common sizes.
        grids = [sequence.sample.grid_thw for sequence in sequences if sequence.sample.grid_thw is not None]
        assert len(grids) in (0, len(sequences)), "a batch mixes clips with and without a size in patches"
        times_s = tuple(sequence.sample.times_s for sequence in sequences)
        return Batch(
            clips=tuple(sequence.sample.clip for sequence in sequences),
            **self._tensors(sequences),
            num_visual=tuple(sum(sequence.is_visual) for sequence in sequences),
            lengths=tuple(map(len, sequences)),
            frames=stack_padded([sequence.sample.frames for sequence in sequences]),
            features=stack_padded([sequence.sample.features for sequence in sequences]),
            grid_thw=tuple(grids) or None,
            times_s=times_s if any(times_s) else (),
            is_right_padded=self.mode == "train",
            skipped=tuple(skipped),
            num_truncated=num_truncated,
        )

    @property
    def _is_packing(self) -> bool:
        return self.is_packed and self.mode == "train"

    def _caption_ids(self, clip: Clip) -> tuple[int, ...]:
        """Returns the untruncated target with its end token; empty for generation and if there is nothing to learn."""
        if self.mode == "generate" or not clip.captions:
            return ()
        ids = self.prompt.encode_caption(clip.captions[0])
        return (*ids, self.prompt.end_id) if ids else ()

    def _prompt(self, grid_thw: GridTHW | None, times_s: FrameTimes | None) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Returns the ids up to the caption, and which of them are placeholders."""
        video = [self.visual] if isinstance(self.visual, int) else self.visual(grid_thw, times_s)
        ids: list[int] = []
        is_visual: list[bool] = []
        for segment in (self.prompt.prefix_ids, *video, self.prompt.suffix_ids):
            # A number stands for that many visual tokens, everything else is text.
            tokens = [self.prompt.pad_id] * segment if isinstance(segment, int) else list(segment)
            ids += tokens
            is_visual += [isinstance(segment, int)] * len(tokens)
        return tuple(ids), tuple(is_visual)

    def _layout(self, sequences: list[_Sequence]) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Returns (R, S), and the row and start of each clip."""
        lengths = [len(sequence) for sequence in sequences]
        if self._is_packing and sequences:
            *starts, width = accumulate(lengths, initial=0)
            return (1, width), [(0, start) for start in starts]
        width = max(lengths, default=0) or len(self._prompt(None, None)[0])
        return (len(lengths), width), [
            # Left padding ends every row at the same column.
            (row, width - length if self.mode == "generate" else 0)
            for row, length in enumerate(lengths)
        ]

    def _tensors(self, sequences: list[_Sequence]) -> dict[str, Any]:
        """Returns ids, mask and positions, each (R, S), and indices, by their names in a `Batch`."""
        shape, starts = self._layout(sequences)
        ids = torch.full(shape, self.prompt.pad_id, dtype=torch.int64)
        attention, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        visual = torch.zeros_like(ids, dtype=torch.bool)
        labels = torch.full_like(ids, IGNORED)
        for sequence, (row, start) in zip(sequences, starts, strict=True):
            middle, end = start + len(sequence.prompt), start + len(sequence)  # prompt | caption
            ids[row, start:end] = torch.tensor([*sequence.prompt, *sequence.caption], dtype=torch.int64)
            attention[row, start:end] = 1
            positions[row, start:end] = torch.arange(len(sequence))
            visual[row, start:middle] = torch.tensor(sequence.is_visual, dtype=torch.bool)
            labels[row, middle:end] = torch.tensor(sequence.caption, dtype=torch.int64)
            labels[row, start : start + 1] = IGNORED  # no token of its clip precedes it
        return {
            "input_ids": ids,
            "attention_mask": attention,
            **flat_indices(visual, labels if self.mode == "train" else None),
            "position_ids": positions if self._is_packing else None,
        }


@dataclass(frozen=True, slots=True)
class ValidationCollator:
    """Turns a list of samples into a `ValidationBatch`; picklable if its collators are.

    Attributes:
        prompts: Collator of the prompts.
        labelled: Collator of the labelled batches.
        batch_size: Largest number of clips in a labelled batch.
        is_captioned: As in `ValidationBatch`.
    """

    prompts: Collator
    labelled: Collator
    batch_size: int
    is_captioned: bool = True

    def __call__(self, items: Sequence[Sample | Skipped]) -> ValidationBatch:
        """Collates the usable samples."""
        # Labelled batches get the features of the prompts later, so frames are decoded and sent once.
        bare = [replace(item, frames=None, features=None) for item in items if isinstance(item, Sample)]
        labelled = [
            self.labelled(bare[start : start + self.batch_size]) for start in range(0, len(bare), self.batch_size)
        ]
        return ValidationBatch(self.prompts(items), tuple(labelled), self.is_captioned)


def flat_indices(visual_mask: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Locates visual tokens and labels, by their names in a `Batch`.

    Args:
        visual_mask: bool (R, S), True where a projected visual token goes.
        labels: int64 (R, S), `IGNORED` where the loss skips a token, as at the start of a row; None for generation.
    """
    visual_indices = visual_mask.flatten().nonzero().flatten()  # (R, S) -> (R · S,) -> (V of all clips,)
    if labels is None:
        return {"visual_indices": visual_indices, "targets": None, "label_indices": None}
    flat = labels.flatten()  # (R, S) -> (R · S,)
    target_indices = (flat != IGNORED).nonzero().flatten()
    # The hidden state in front of a token predicts it.
    return {"visual_indices": visual_indices, "targets": flat[target_indices], "label_indices": target_indices - 1}


def stack_padded(tensors: list[Tensor | None]) -> Tensor | None:
    """Stacks tensors, (B, ...), padded with zeros to the largest; None if the samples have none."""
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) in (0, len(tensors)), "a batch mixes decoded and cached clips"
    if not present:
        return None
    if len({tensor.shape for tensor in present}) == 1:
        return torch.stack(present)
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in present), strict=True)]
    stacked = present[0].new_zeros((len(present), *shape))
    for row, tensor in zip(stacked, present, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked
