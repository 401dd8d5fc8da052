"""Batches as the collator makes them, of real ids and masks, as their values decide on shapes; frames and features are fake elsewhere.

Legend: B clips, V visual tokens a clip, T caption tokens, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlmcap.types import Batch, Clip, GridTHW

IGNORED = -100


def language_batch(
    num_clips: int, runs: Sequence[int], num_prompt: int, num_caption: int, grid_thw: GridTHW | None = None, gap: int = 0
) -> Batch:
    """A batch of equal clips without padding.

    Args:
        num_clips: B.
        runs: Visual tokens of each run; V is their sum.
        num_prompt: Text tokens in front of the caption, half of them before the visual tokens.
        num_caption: T, end token included; 0 makes a batch for generation.
        grid_thw: A clip's size in patches, where the model's positions go by it.
        gap: Text tokens between two runs.
    """
    before = num_prompt // 2
    visual = [False] * before
    for index, run in enumerate(runs):
        visual += [False] * (gap if index else 0) + [True] * run
    visual += [False] * (num_prompt - before + num_caption)
    mask = torch.tensor(visual).expand(num_clips, -1).clone()
    ids = torch.ones(mask.shape, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    if num_caption:
        labels[:, -num_caption:] = 1
    return Batch(
        clips=tuple(Clip(str(index), "", ("",)) for index in range(num_clips)),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        visual_mask=mask,
        labels=labels if num_caption else None,
        grid_thw=None if grid_thw is None else (grid_thw,) * num_clips,
    )
