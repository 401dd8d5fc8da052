"""Keys and values of rows that start and end at different times, written in place into buffers that stay where they are.

Legend: R rows, N rows of one call, H heads of keys, D width of a head, S columns, q tokens a row in one step.
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
class _Places:
    """Where the next call's keys go, the same in every layer.

    Attributes:
        num_rows: R that the buffers hold.
        num_columns: S that the buffers hold.
        first: First row of newcomers; None in a step of all rows.
        width: S of the newcomers' prompts, or columns that a step looks at.
        rows: int64 (N, 1), and `columns`, int64 (N, q), of a step's tokens.
    """

    num_rows: int
    num_columns: int = 0
    first: int | None = None
    width: int = 0
    rows: Tensor | None = None
    columns: Tensor | None = None


class _RowLayer(CacheLayerMixin):
    """One layer; row r holds its tokens in columns 0 to its length, and anything behind."""

    is_sliding = False

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers of the number format that the states have."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._room(states) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the states (N, H, q, D).

        What to look at: newcomers at themselves, a step at all that its rows hold.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self.places
        if places.num_columns > self.keys.shape[2]:
            self.keys, self.values = (self._grown(buffer) for buffer in (self.keys, self.values))
        if places.first is not None:
            rows = slice(places.first, places.first + len(key_states))
            self.keys[rows, :, : places.width] = key_states
            self.values[rows, :, : places.width] = value_states
            return key_states, value_states
        self.keys[places.rows, :, places.columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[places.rows, :, places.columns] = value_states.transpose(1, 2).to(self.values.dtype)
        count = len(key_states)
        return self.keys[:count, :, : places.width], self.values[:count, :, : places.width]

    def _room(self, like: Tensor) -> Tensor:
        # Zeros: what stands behind a row's end has no weight, but 0 times what memory happens to hold may be no number.
        return like.new_zeros(self.places.num_rows, like.shape[1], self.places.num_columns, like.shape[3])

    def _grown(self, buffer: Tensor) -> Tensor:
        room = self._room(buffer)
        room[:, :, : buffer.shape[2]] = buffer
        return room

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of newcomers, who see no keys but their own; steps bring a mask with them."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: newcomers start at the first column, and steps bring positions with them."""
        return 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1


class RowCache(Cache):
    """A cache for transformers' models whose rows come and go.

    Before each call of the model, one says which rows it is for.

    Args:
        num_rows: R, the most rows at a time.
    """

    def __init__(self, num_rows: int) -> None:
        self._places = _Places(num_rows)
        super().__init__(layer_class_to_replicate=partial(_RowLayer, self._places))

    @property
    def num_columns(self) -> int:
        """S, the tokens that a row has room for."""
        return self._places.num_columns

    def reserve(self, num_columns: int) -> bool:
        """Makes room for rows of so many tokens; returns whether the buffers are replaced by larger ones."""
        is_larger = num_columns > self._places.num_columns
        if is_larger:
            self._places.num_columns = num_columns
        return is_larger

    def expect_newcomers(self, first: int, width: int) -> None:
        """The next call brings the prompts, padded on the right to `width`, of rows `first` and behind."""
        self._places.first, self._places.width = first, width

    def expect_step(self, lengths: Tensor, width: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions, int64 (N, q), and what each token may look at, bool (N, 1, q, S), of the next call.

        Q tokens for each of rows 0 to N.

        Args:
            lengths: int64 (N,), tokens that each row holds.
            width: S, columns that the step looks at; at least the largest length and q.
            num_tokens: q.
        """
        places = self._places
        places.first, places.width = None, width
        places.rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        places.columns = lengths[:, None] + torch.arange(num_tokens, device=lengths.device)
        mask = torch.arange(width, device=lengths.device) <= places.columns[:, :, None]
        return places.columns, mask[:, None]

    def move_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows `sources` to the places of rows `targets`, which are lost."""
        for layer in self.layers:
            for source, target in zip(sources, targets, strict=True):
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]
