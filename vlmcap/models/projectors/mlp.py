"""Position-wise maps from vision to language width.

Legend: B batch, F frames, P patches a frame, Dv vision width, Dl language width.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlmcap.models.projectors.base import Projection, TokenLayout


class MLPProjector(Projection):
    """`depth` linear layers with GELU between them, the same for every token; depth 2 is LLaVA-1.5's projector.

    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", https://arxiv.org/abs/2310.03744.

    Args:
        in_dim: Width of the features that come in.
        out_dim: Dl.
        depth: Number of linear layers, at least 1; 1 is a linear projector.
        use_layer_norm: LayerNorm in front, which gives the features of any encoder a common scale.
    """

    def __init__(self, in_dim: int, out_dim: int, depth: int = 2, *, use_layer_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.norm = nn.LayerNorm(in_dim) if use_layer_norm else nn.Identity()
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Projected tokens, (B, F, P, in_dim) -> (B, F, P, Dl)."""
        projected: Tensor = self.layers(self.norm(tokens))
        return projected
