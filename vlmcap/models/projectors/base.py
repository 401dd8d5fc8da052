"""How tokens stand when they reach a projection.

Legend: B batch, F frames or stacks of frames, P tokens a frame, V tokens a clip, D width, N tokens of the question, Dl language width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """What a projection may have to know beside the tokens (B, F, P, D).

    Attributes:
        grid: (h, w) on which a frame's tokens stood before some were chosen, row-major.
        num_frames: F.
        frame_of: int64 (B, V), the frame of each token, where frames keep different numbers: tokens are then (B, 1, V, D).
        prompt: (N, Dl), embeddings of the question.
    """

    grid: tuple[int, int]
    num_frames: int
    frame_of: Tensor | None = None
    prompt: Tensor | None = None


class Projection(nn.Module):
    """Map from vision to language width: what every kind of projector is inside."""

    def forward(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens of the language model, (B, F, P, D) -> (B, F, P', Dl), or (B, 1, V, Dl) where none belongs to a frame."""
        raise NotImplementedError
