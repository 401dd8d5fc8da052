"""Temporal modelling: position embeddings that distinguish the frames of a clip, and attention along time.

Legend: B batch, F frames, P tokens per frame (row-major over a grid h × w), V = F · P tokens per clip, D width,
Dl language width, H heads, C inner width, d = C / H; for windows, w window, n blocks, G global tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcap.models.projectors.base import Grid, join_heads, split_heads
from vlmcap.models.projectors.reducers import resize_grid


class FramePosition(nn.Module):
    """Adds learned embeddings of the frame index and of the position in the frame.

    Args:
        dim: D.
        max_frames: Maximum frames, or stacks of frames, of a clip.
        grid: Grid (h, w) of the patches; other grids interpolate the embeddings. None embeds the frame index only.
        std: Standard deviation of the initial embeddings.
    """

    def __init__(self, dim: int, max_frames: int, grid: Grid | None, std: float = 0.02) -> None:
        super().__init__()
        self.grid = grid
        self.frame = nn.Parameter(torch.randn(max_frames, 1, dim) * std)
        self.patch = nn.Parameter(torch.randn(1, grid[0] * grid[1], dim) * std) if grid else None

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, F, P, D) on `grid` -> (B, F, P, D)."""
        assert tokens.shape[1] <= len(self.frame), f"{tokens.shape[1]} frames, at most {len(self.frame)} expected"
        tokens = tokens + self.frame[: tokens.shape[1]]
        if self.patch is None or self.grid is None:
            return tokens
        return tokens + resize_grid(self.patch, self.grid, grid)


class NormalizedPosition(nn.Module):
    """LayerNorm and `FramePosition` before the projection: `temporal=position`, and the perceiver's frame embedding.

    Before the projection, its layers can combine the content of a token with its position and time. After it, both
    could only be added, and left-and-early would look like right-and-late. The norm gives the features of any encoder
    the scale of the embeddings.
    """

    def __init__(self, dim: int, max_frames: int, grid: Grid | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.position = FramePosition(dim, max_frames, grid, std=0.3)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, F, P, D) on `grid` -> (B, F, P, D)."""
        embedded: Tensor = self.position(self.norm(tokens), grid)
        return embedded


class TemporalAttention(nn.Module):
    """Self-attention along time for each patch, with residual: the temporal half of divided space-time attention.

    Source: Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?",
    https://arxiv.org/abs/2102.05095.

    Args:
        dim: Dl.
        hidden_dim: C, a multiple of `num_heads`.
        num_heads: H.
        max_frames: Length of the learned frame embedding.
        grid: Grid (h, w) of a frame's tokens.
    """

    def __init__(self, dim: int, *, hidden_dim: int, num_heads: int, max_frames: int, grid: Grid) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.position = FramePosition(dim, max_frames, grid)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, F, P, Dl) on `grid` -> (B, F, P, Dl)."""
        tokens = self.position(tokens, grid)
        columns = self.qkv(self.norm(tokens)).transpose(1, 2).flatten(0, 1)  # (B, F, P, 3 C) -> (B · P, F, 3 C)
        # (B · P, F, 3 C) -> 3 × (B · P, H, F, d)
        query, key, value = columns.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = join_heads(F.scaled_dot_product_attention(query, key, value))  # (B · P, H, F, d) -> (B · P, F, C)
        return tokens + self.out(mixed).unflatten(0, (len(tokens), -1)).transpose(1, 2)  # (B · P, F, Dl) -> tokens


class LocalGlobalAttention(nn.Module):
    """Attention of each token to its neighbours and to global tokens, with residual (`temporal=local_global`).

    Time and memory are linear in the number of tokens, not quadratic.

    Windows and global tokens are those of Longformer (Beltagy et al., https://arxiv.org/abs/2004.05150). There, distant
    tokens reach each other through the global tokens of the previous layer; here the global tokens attend to all tokens
    first, so one layer suffices. Rotary embeddings (Su et al., https://arxiv.org/abs/2104.09864) encode the order in a
    window.

    Args:
        dim: Dl.
        hidden_dim: C, a multiple of 2 · `num_heads`.
        num_heads: H.
        window: w, visible tokens on each side.
        num_global: G; 0 uses windows only.
    """

    def __init__(self, dim: int, *, hidden_dim: int, num_heads: int, window: int, num_global: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * hidden_dim)
        self.global_query = nn.Parameter(torch.randn(1, num_global, hidden_dim))
        self.global_key_value = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, F, P, Dl) -> (B, F, P, Dl), with the clip's tokens as one sequence."""
        sequence = self.norm(tokens.flatten(1, 2))  # (B, F, P, Dl) -> (B, V, Dl)
        query, key, value = (split_heads(third, self.num_heads) for third in self.qkv(sequence).chunk(3, dim=-1))
        # 1. The global tokens attend to all tokens.
        # (1, G, C) -> (1, H, G, d) -> (B, H, G, d)
        readers = split_heads(self.global_query.to(query.dtype), self.num_heads).expand(len(tokens), -1, -1, -1)
        read = join_heads(F.scaled_dot_product_attention(readers, key, value))  # (B, H, G, d) -> (B, G, C)
        halves = self.global_key_value(self.global_query + read).chunk(2, dim=-1)
        global_key, global_value = (split_heads(half, self.num_heads) for half in halves)
        # 2. Every token attends to its window and to the global tokens.
        query, key = rotate(query), rotate(key)
        mixed = windowed_attention(query, key, value, global_key, global_value, self.window)
        return tokens + self.out(join_heads(mixed)).view_as(tokens)


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, global_key: Tensor, global_value: Tensor, window: int
) -> Tensor:
    """Computes attention of each token to those at most `window` away and to the global ones.

    A block of w queries attends to its own block of keys and the two adjacent ones, so dense kernels run on n blocks.

    Args:
        query: (B, H, V, d).
        key: (B, H, V, d).
        value: (B, H, V, d).
        global_key: (B, H, G, d).
        global_value: (B, H, G, d).
        window: w.

    Returns:
        (B, H, V, d).
    """
    batch, length, num_global = len(query), query.shape[2], global_key.shape[2]
    # Blocks as long as the window: a token's window then lies in its own block and the two beside it.
    size = min(window, length)
    num_blocks = -(-length // size)
    mask = _block_mask(length, size, window, num_global, query.device).repeat(batch, 1, 1, 1)
    padded = F.pad(query, (0, 0, 0, num_blocks * size - length))
    # (B, H, n · size, d) -> (B · n, H, size, d)
    queries = padded.unflatten(2, (num_blocks, size)).transpose(1, 2).flatten(0, 1)

    def blocks_of(local: Tensor, summary: Tensor) -> Tensor:  # -> (B · n, H, 3 · size + G, d)
        summary = summary.unsqueeze(1).expand(-1, num_blocks, -1, -1, -1)  # (B, H, G, d) -> (B, n, H, G, d)
        return torch.cat([_adjacent_blocks(local, size, num_blocks), summary], dim=3).flatten(0, 1)

    keys, values = blocks_of(key, global_key), blocks_of(value, global_value)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    # (B · n, H, size, d) -> (B, H, V, d)
    return mixed.unflatten(0, (batch, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _adjacent_blocks(tokens: Tensor, size: int, num_blocks: int) -> Tensor:
    """Joins each block with the previous and the next one, (B, H, V, d) -> (B, n, H, 3 · size, d)."""
    # One empty block in front, and behind as many tokens as fill the last block and one more.
    padded = F.pad(tokens, (0, 0, size, (num_blocks + 1) * size - tokens.shape[2]))
    return padded.unfold(2, 3 * size, size).permute(0, 2, 1, 4, 3)


def _block_mask(length: int, size: int, window: int, num_global: int, device: torch.device) -> Tensor:
    """Returns the mask, bool (n, 1, size, 3 · size + G): True for real tokens of the window and all global tokens.

    Padding queries see at least the last token, as a block is not longer than the window; with nothing to attend to,
    their output could be NaN.
    """
    starts = torch.arange(0, length, size, device=device)[:, None]
    rows = starts + torch.arange(size, device=device)
    columns = starts + torch.arange(-size, 2 * size, device=device)
    # (n, size, 3 · size)
    is_near = (rows[:, :, None] - columns[:, None, :]).abs() <= window
    is_real = (columns >= 0) & (columns < length)
    return F.pad(is_near & is_real[:, None, :], (0, num_global), value=True).unsqueeze(1)


def rotate(heads: Tensor) -> Tensor:
    """Applies rotary embeddings of the index in the sequence, (B, H, V, d) -> (B, H, V, d)."""
    length, width = heads.shape[-2:]
    # (d / 2,)
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=heads.device) / width)
    angles = torch.arange(length, device=heads.device)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    # Pairs are (i, i + d / 2), as in Llama, and not neighbours.
    left, right = heads.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(heads.dtype)
