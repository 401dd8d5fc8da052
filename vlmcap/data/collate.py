"""Samples into a batch: the prompt around the visual tokens, the caption behind it.

Legend: B clips, F frames, P patches a frame, Dv vision width, V visual tokens a clip, S sequence, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlmcap.types import Batch, Clip, Sample, Skipped

IGNORED = -100  # label of positions that the loss passes over


class PromptEncoder(Protocol):
    """What the collator asks of a tokenizer with its chat template."""

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
        """The token on padding and on visual placeholders; it may equal `end_id`."""
        ...

    def encode_caption(self, text: str) -> list[int]:
        """Tokens of a caption, without the end token."""
        ...


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence in its parts; they are joined, never searched for again, so no label can be lost to a tokenisation mismatch."""

    sample: Sample
    caption: tuple[int, ...]


@dataclass
class Collator:
    """Turns a list of samples into a `Batch`; picklable if `prompt` is.

    Train: prefix, V placeholders, suffix, caption, end token; padded on the right; the first caption of a clip is the target.
    Generate: prefix, V placeholders, suffix; labels are None. All rows have one length, so every row ends where generation goes on,
    as left padding would have it.

    Attributes:
        prompt: Token ids of the parts.
        num_visual_tokens: V, never cut.
        max_caption_tokens: Longest caption, end token included; a longer one is cut and keeps no end token, so the model does not
            learn to stop there.
        mode: "train" or "generate".

    Raises:
        ValueError: A number or the mode is out of its range.
    """

    prompt: PromptEncoder
    num_visual_tokens: int
    max_caption_tokens: int
    mode: Literal["train", "generate"] = "train"

    def __post_init__(self) -> None:
        if self.num_visual_tokens < 0 or self.max_caption_tokens < 1:
            raise ValueError(
                "num_visual_tokens must be at least 0 and max_caption_tokens at least 1, "
                f"not {self.num_visual_tokens} and {self.max_caption_tokens}"
            )
        if self.mode not in ("train", "generate"):
            raise ValueError(f"mode must be 'train' or 'generate', not '{self.mode}'")

    def __call__(self, items: Sequence[Sample | Skipped]) -> Batch:
        """The batch of the usable samples; B is 0, with S that of the bare prompt, if there is none."""
        skipped = [item for item in items if isinstance(item, Skipped)]
        rows: list[_Row] = []
        num_truncated = 0
        for item in items:
            if isinstance(item, Skipped):
                continue
            caption = self._caption_ids(item.clip)
            if self.mode == "train" and not caption:
                skipped.append(Skipped(item.clip, f"clip {item.clip.id} has no caption to learn from: it is empty or gives no tokens"))
                continue
            num_truncated += len(caption) > self.max_caption_tokens
            rows.append(_Row(item, caption[: self.max_caption_tokens]))
        ids, attention, visual, labels = self._tensors(rows)
        return Batch(
            clips=tuple(row.sample.clip for row in rows),
            input_ids=ids,
            attention_mask=attention,
            visual_mask=visual,
            labels=labels if self.mode == "train" else None,
            frames=_stack([row.sample.frames for row in rows]),
            features=_stack([row.sample.features for row in rows]),
            skipped=tuple(skipped),
            num_truncated=num_truncated,
        )

    def _caption_ids(self, clip: Clip) -> tuple[int, ...]:
        """The target with its end token, uncut; empty if there is nothing to learn, and for generation."""
        if self.mode == "generate" or not clip.captions:
            return ()
        ids = self.prompt.encode_caption(clip.captions[0])
        return (*ids, self.prompt.end_id) if ids else ()

    def _tensors(self, rows: list[_Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, attention mask, visual mask and labels, each (B, S)."""
        prefix, suffix, visual_length = list(self.prompt.prefix_ids), list(self.prompt.suffix_ids), self.num_visual_tokens
        prompt = prefix + [self.prompt.pad_id] * visual_length + suffix
        width = len(prompt) + max((len(row.caption) for row in rows), default=0)
        ids = torch.full((len(rows), width), self.prompt.pad_id, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        visual = torch.zeros_like(ids, dtype=torch.bool)
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            length = len(prompt) + len(row.caption)
            ids[i, :length] = torch.tensor([*prompt, *row.caption], dtype=torch.int64)
            attention[i, :length] = 1
            visual[i, len(prefix) : len(prefix) + visual_length] = True
            labels[i, len(prompt) : length] = torch.tensor(row.caption, dtype=torch.int64)
        return ids, attention, visual, labels


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    """(B, ...), or None where the samples carry none."""
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) in (0, len(tensors)), "a batch mixes decoded and cached clips"
    return torch.stack(present) if present else None
