"""InternVL's projector: neighbouring patches joined into one wider token, then an MLP.

Legend: B batch, F frames, P patches a frame (row-major over a grid h × w), D width, s factor, Dl language width.
"""

from __future__ import annotations

from torch import Tensor

from vlmcap.models.projectors.base import TokenLayout
from vlmcap.models.projectors.mlp import MLPProjector


class PixelShuffleProjector(MLPProjector):
    """Joins s × s patches into a token of s² · D, then LayerNorm and an MLP.

    Order of tokens and of the channels in a token are InternVL's, so its weights fit.
    Source: Chen et al., "How Far Are We to GPT-4V?", https://arxiv.org/abs/2404.16821.

    Args:
        in_dim: D.
        out_dim: Dl.
        factor: s, a divisor of the grid.
        depth: Linear layers; InternVL has two.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: int = 2, depth: int = 2) -> None:
        super().__init__(in_dim * factor**2, out_dim, depth, use_layer_norm=True)
        self.factor = factor

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projected tokens, (B, F, P, D) -> (B, F, P / s², Dl)."""
        return super().forward(shuffle_patches(tokens, layout.grid, self.factor), layout)


def shuffle_patches(tokens: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Patches joined s × s, (B, F, P, D) -> (B, F, P / s², s² · D): rows inside a token first, then columns, then channels."""
    batch, frames, _, width = tokens.shape
    rows, columns = grid[0] // factor, grid[1] // factor
    cells = tokens.reshape(batch, frames, rows, factor, columns, factor, width).transpose(3, 4)
    return cells.reshape(batch, frames, rows * columns, factor**2 * width)
