"""Projectors from vision to language width: a dataclass for each kind, with the keys that it reads and no others."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from vlmcap.config.checks import follows, only_with, require, require_positive
from vlmcap.config.choices import Queries, Reducer, Temporal
from vlmcap.config.kinds import register


@dataclass
class ProjectorConfig:
    """What every projector has; it is trained in full."""

    name: str = MISSING
    kind: str = MISSING
    checkpoint: str | None = (
        None  # start from this projector: a .ckpt of ours, or the folder of a LLaVA or InternVL checkpoint
    )


@register("projector")
@dataclass
class NativeProjectorConfig(ProjectorConfig):
    """The projector or patch merger that a pretrained VLM brings."""

    kind: str = "native"


@dataclass
class TokenProjectorConfig(ProjectorConfig):
    """What happens around every projector of ours: fewer tokens in front of it, and frames that learn of each other."""

    hidden_dim: int | None = None  # inner width of what attends or convolves; null is the encoder's width
    num_heads: int = 8
    reducer: Reducer = Reducer.none
    pool_size: int = only_with(
        "reducer=pool", lambda c: c.reducer is Reducer.pool, 2
    )  # patches per side that are averaged
    resample_size: int = only_with(
        "reducer=resample", lambda c: c.reducer is Reducer.resample, 12
    )  # patches per side that are left
    keep_ratio: float = only_with(
        "reducer=merge", lambda c: c.chooses_tokens, 0.25
    )  # share of tokens that merge and saliency leave
    frame_stack: int = follows(
        "hardware.frame_stack", 1
    )  # consecutive frames whose features at one position become one token
    temporal: Temporal = Temporal.none
    window: int = only_with(
        "temporal=local_global", lambda c: c.temporal is Temporal.local_global, 256
    )  # tokens seen on each side
    num_global: int = only_with(
        "temporal=local_global", lambda c: c.temporal is Temporal.local_global, 8
    )  # its global tokens

    @property
    def attends(self) -> bool:
        """Whether frames attend to each other behind the projector."""
        return self.temporal in (Temporal.attention, Temporal.local_global)

    @property
    def has_heads(self) -> bool:
        """Whether any part has attention heads, of which `hidden_dim` must be a multiple."""
        return self.attends

    @property
    def chooses_tokens(self) -> bool:
        """Whether the reducer leaves tokens that stand on no grid."""
        return self.reducer in (Reducer.merge, Reducer.saliency)

    def __post_init__(self) -> None:
        counts = [name for name in _COUNTS if hasattr(self, name)]
        require_positive("projector", self, *counts)
        require(0 < self.keep_ratio <= 1, f"projector.keep_ratio must be above 0 and at most 1, not {self.keep_ratio}")
        require(self.num_global >= 0, f"projector.num_global must not be negative, not {self.num_global}")


_COUNTS = (
    "depth", "num_layers", "num_heads", "num_queries", "shuffle", "pool_size", "resample_size", "frame_stack", "window", "hidden_dim"
)  # fmt: skip
_WIDTH = (
    "temporal=attention"  # what makes `hidden_dim` and `num_heads` count where the projection itself does not attend
)


@register("projector")
@dataclass
class LinearConfig(TokenProjectorConfig):
    """One linear layer for each token."""

    kind: str = "linear"
    hidden_dim: int | None = only_with(_WIDTH, lambda c: c.attends, None)
    num_heads: int = only_with(_WIDTH, lambda c: c.attends, 8)
    use_layer_norm: bool = False  # in front of it
    reducer: Reducer = follows("llm.suggested.reducer", Reducer.none)


@register("projector")
@dataclass
class MlpConfig(LinearConfig):
    """Linear layers with GELU between them."""

    kind: str = "mlp"
    depth: int = 2  # linear layers
    temporal: Temporal = Temporal.position


@register("projector")
@dataclass
class PixelShuffleConfig(TokenProjectorConfig):
    """Neighbouring patches joined in one token, then LayerNorm and linear layers."""

    kind: str = "pixel_shuffle"
    hidden_dim: int | None = only_with(_WIDTH, lambda c: c.attends, None)
    num_heads: int = only_with(_WIDTH, lambda c: c.attends, 8)
    depth: int = 2  # linear layers
    shuffle: int = 2  # patches per side that are joined
    temporal: Temporal = Temporal.position


@register("projector")
@dataclass
class CrossAttentionConfig(TokenProjectorConfig):
    """Queries that attend to the patches of a frame, or to the whole clip."""

    kind: str = "cross_attention"
    num_layers: int = 4
    queries: Queries = Queries.learned
    num_queries: int = only_with("queries=learned", lambda c: c.queries is Queries.learned, 64)  # per frame
    temporal: Temporal = Temporal.position

    @property
    def has_heads(self) -> bool:
        """Always."""
        return True


@register("projector")
@dataclass
class PerceiverConfig(TokenProjectorConfig):
    """Latents that read all frames of a clip, however many there are; it has a frame embedding of its own."""

    kind: str = "perceiver"
    num_layers: int = 2
    num_queries: int = 128  # latents per clip
    frame_stack: int = 1

    @property
    def has_heads(self) -> bool:
        """Always."""
        return True


@register("projector")
@dataclass
class CAbstractorConfig(TokenProjectorConfig):
    """Convolutions around a pooling."""

    kind: str = "c_abstractor"
    num_heads: int = only_with(_WIDTH, lambda c: c.attends, 8)
    num_layers: int = 3  # convolutional blocks on each side of the pooling
    num_queries: int = 144  # tokens per frame, a square number
    temporal: Temporal = Temporal.position
