"""Settings of projectors from vision to language width, one dataclass per kind with exactly the keys that it reads."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from vlmcap.config.checks import follows, only_with, require, require_positive
from vlmcap.config.choices import Queries, Reducer, Temporal
from vlmcap.config.kinds import register


@dataclass
class ProjectorConfig:
    """Settings of every projector, which is always trained in full."""

    name: str = MISSING  # name of the projector in titles and tables
    kind: str = MISSING  # kind of projector, which selects the schema
    # Weights to start from: a .ckpt of vlmcap, or the folder of a LLaVA or InternVL checkpoint; null starts at random.
    checkpoint: str | None = None


@register("projector")
@dataclass
class NativeProjectorConfig(ProjectorConfig):
    """The projector or patch merger of a pretrained VLM."""

    kind: str = "native"  # kind of projector


@dataclass
class TokenProjectorConfig(ProjectorConfig):
    """Settings of every projector but `native`: token reduction before it, and exchange between frames."""

    hidden_dim: int | None = None  # inner width of attention and convolutions; null is the width of the encoder
    num_heads: int = 8  # attention heads
    reducer: Reducer = Reducer.none  # how the number of visual tokens is reduced before the projector
    # Patches per side that are averaged into one.
    pool_size: int = only_with("reducer=pool", lambda c: c.reducer is Reducer.pool, 2)
    # Patches per side after resampling.
    resample_size: int = only_with("reducer=resample", lambda c: c.reducer is Reducer.resample, 12)
    # Share of tokens that the reducers merge and saliency keep.
    keep_ratio: float = only_with("reducer=merge", lambda c: c.chooses_tokens, 0.25)
    frame_stack: int = follows("hardware.frame_stack", 1)  # consecutive frames whose features at a position are joined
    temporal: Temporal = Temporal.none  # how information is exchanged between frames
    # Tokens on each side that a token attends to.
    window: int = only_with("temporal=local_global", lambda c: c.temporal is Temporal.local_global, 256)
    # Global tokens, which attend to all others.
    num_global: int = only_with("temporal=local_global", lambda c: c.temporal is Temporal.local_global, 8)

    @property
    def attends(self) -> bool:
        """Whether frames attend to each other after the projector."""
        return self.temporal in (Temporal.attention, Temporal.local_global)

    @property
    def has_heads(self) -> bool:
        """Whether there are attention heads, of which `hidden_dim` must be a multiple."""
        return self.attends

    @property
    def chooses_tokens(self) -> bool:
        """Whether the reducer keeps tokens that form no grid."""
        return self.reducer in (Reducer.merge, Reducer.saliency)

    def __post_init__(self) -> None:
        counts = [name for name in _COUNTS if hasattr(self, name)]
        require_positive("projector", self, *counts)
        require(0 < self.keep_ratio <= 1, f"projector.keep_ratio must be above 0 and at most 1, not {self.keep_ratio}")
        require(self.num_global >= 0, f"projector.num_global must not be negative, not {self.num_global}")


# Fields that must be at least 1.
_COUNTS = (
    "depth", "num_layers", "num_heads", "num_queries", "shuffle",
    "pool_size", "resample_size", "frame_stack", "window", "hidden_dim",
)  # fmt: skip
_WIDTH = "temporal=attention"  # makes a projection without attention read `hidden_dim` and `num_heads`


@register("projector")
@dataclass
class LinearConfig(TokenProjectorConfig):
    """One linear layer per token."""

    kind: str = "linear"  # kind of projector
    hidden_dim: int | None = only_with(_WIDTH, lambda c: c.attends, None)  # width of attention; null is the encoder's
    num_heads: int = only_with(_WIDTH, lambda c: c.attends, 8)  # attention heads
    use_layer_norm: bool = False  # apply LayerNorm before the first layer
    reducer: Reducer = follows("llm.suggested.reducer", Reducer.none)  # how the number of visual tokens is reduced


@register("projector")
@dataclass
class MlpConfig(LinearConfig):
    """Linear layers with GELU between them."""

    kind: str = "mlp"  # kind of projector
    depth: int = 2  # number of linear layers
    temporal: Temporal = Temporal.position  # how information is exchanged between frames


@register("projector")
@dataclass
class PixelShuffleConfig(TokenProjectorConfig):
    """Neighbouring patches joined into one token, then LayerNorm and linear layers."""

    kind: str = "pixel_shuffle"  # kind of projector
    hidden_dim: int | None = only_with(_WIDTH, lambda c: c.attends, None)  # width of attention; null is the encoder's
    num_heads: int = only_with(_WIDTH, lambda c: c.attends, 8)  # attention heads
    depth: int = 2  # number of linear layers
    shuffle: int = 2  # patches per side that are joined into one token
    temporal: Temporal = Temporal.position  # how information is exchanged between frames


@register("projector")
@dataclass
class CrossAttentionConfig(TokenProjectorConfig):
    """Queries that attend to the patches of a frame, or to the full clip."""

    kind: str = "cross_attention"  # kind of projector
    num_layers: int = 4  # number of cross-attention layers
    queries: Queries = Queries.learned  # what the queries are
    # Learned queries per frame.
    num_queries: int = only_with("queries=learned", lambda c: c.queries is Queries.learned, 64)
    temporal: Temporal = Temporal.position  # how information is exchanged between frames

    @property
    def has_heads(self) -> bool:
        """Whether there are attention heads: always."""
        return True


@register("projector")
@dataclass
class PerceiverConfig(TokenProjectorConfig):
    """Latents that attend to any number of frames of a clip; it has its own frame embedding."""

    kind: str = "perceiver"  # kind of projector
    num_layers: int = 2  # number of layers
    num_queries: int = 128  # latents per clip, which become its visual tokens
    frame_stack: int = 1  # consecutive frames whose features at a position are joined

    @property
    def has_heads(self) -> bool:
        """Whether there are attention heads: always."""
        return True


@register("projector")
@dataclass
class CAbstractorConfig(TokenProjectorConfig):
    """Convolutions before and after a pooling."""

    kind: str = "c_abstractor"  # kind of projector
    num_heads: int = only_with(_WIDTH, lambda c: c.attends, 8)  # attention heads
    num_layers: int = 3  # convolutional blocks on each side of the pooling
    num_queries: int = 144  # visual tokens per frame, a square number
    temporal: Temporal = Temporal.position  # how information is exchanged between frames
