"""A key-value cache whose slots start and end at different times, in preallocated buffers that are written in place.

Legend: R slots, N slots of one call, H key heads, D head width, S columns, q tokens per slot in one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _WritePlan:
    """Where the next call writes its keys and values, shared by all layers.

    Attributes:
        num_slots: R, slots of the buffers.
        num_columns: S, columns of the buffers.
        first: First slot of new prompts; None for a decoding step.
        width: S of the new prompts, or the columns that a step attends to.
        slots: int64 (N, 1), slots of a step's tokens.
        columns: int64 (N, q), columns of a step's tokens.
    """

    num_slots: int
    num_columns: int = 0
    first: int | None = None
    width: int = 0
    slots: Tensor | None = None
    columns: Tensor | None = None


class _SlotLayer(CacheLayerMixin):
    """One layer of the cache; a slot holds its tokens from column 0 on, and stale values after its length."""

    is_sliding = False

    def __init__(self, plan: _WritePlan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates buffers in the dtype of the states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._allocate(states) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the states (N, H, q, D) and returns the keys and values to attend to.

        New prompts attend to themselves, a decoding step to everything in its slots.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.plan
        # `reserve` has raised the capacity since the last call.
        if plan.num_columns > self.keys.shape[2]:
            self.keys, self.values = (self._grow(buffer) for buffer in (self.keys, self.values))
        # A prefill: new prompts attend to their own keys alone, which need not be read back.
        if plan.first is not None:
            slots = slice(plan.first, plan.first + len(key_states))
            self.keys[slots, :, : plan.width] = key_states
            self.values[slots, :, : plan.width] = value_states
            return key_states, value_states
        # (N, H, q, D) -> (N, q, H, D): advanced indices with a slice between them put their axes first.
        self.keys[plan.slots, :, plan.columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[plan.slots, :, plan.columns] = value_states.transpose(1, 2).to(self.values.dtype)
        count = len(key_states)
        # Only the slots and columns that this step needs: (R, H, S, D) -> (N, H, width, D).
        return self.keys[:count, :, : plan.width], self.values[:count, :, : plan.width]

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, because masked columns have weight 0, and 0 times uninitialised memory may be NaN.
        return like.new_zeros(self.plan.num_slots, like.shape[1], self.plan.num_columns, like.shape[3])

    def _grow(self, buffer: Tensor) -> Tensor:
        larger = self._allocate(buffer)
        larger[:, :, : buffer.shape[2]] = buffer
        return larger

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the mask size for new prompts, which see only their own keys; steps pass a mask of their own."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Returns 0, as new prompts start at the first column and steps pass their positions."""
        return 0

    def get_max_length(self) -> int:
        """Returns -1, as the cache grows."""
        return -1


class SlotCache(Cache):
    """A cache for models of transformers with slots that are filled and freed independently.

    Each call of the model must be preceded by `expect_prompts` or `expect_step`.

    Args:
        num_slots: R, maximum captions at a time.
    """

    def __init__(self, num_slots: int) -> None:
        self._plan = _WritePlan(num_slots)
        # The base class makes a layer for each layer of the model, on its first call.
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, self._plan))

    @property
    def num_columns(self) -> int:
        """S, capacity of a slot in tokens."""
        return self._plan.num_columns

    def reserve(self, num_columns: int) -> bool:
        """Ensures a capacity of `num_columns` tokens per slot; returns whether the buffers will be reallocated."""
        is_larger = num_columns > self._plan.num_columns
        if is_larger:
            self._plan.num_columns = num_columns
        return is_larger

    def expect_prompts(self, first: int, width: int) -> None:
        """Announces a call with prompts, right-padded to `width`, for the slots from `first` on."""
        self._plan.first, self._plan.width = first, width

    def expect_step(self, lengths: Tensor, width: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Announces a call with q tokens for each of the first N slots.

        Args:
            lengths: int64 (N,), tokens that each slot holds.
            width: S, columns that the step attends to; at least the largest length plus q.
            num_tokens: q.

        Returns:
            Positions, int64 (N, q), and the attention mask, bool (N, 1, q, S).
        """
        plan = self._plan
        plan.first, plan.width = None, width
        # (N, 1), broadcast against the columns (N, q) when the layers write.
        plan.slots = torch.arange(len(lengths), device=lengths.device)[:, None]
        plan.columns = lengths[:, None] + torch.arange(num_tokens, device=lengths.device)
        # Token i of a slot attends to the columns up to its own.
        mask = torch.arange(width, device=lengths.device) <= plan.columns[:, :, None]  # (N, q, S)
        # (N, q, S) -> (N, 1, q, S), the same for all heads
        return plan.columns, mask[:, None]

    def move_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies slots `sources` over slots `targets`, whose content is lost."""
        for layer in self.layers:
            for source, target in zip(sources, targets, strict=True):
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]
