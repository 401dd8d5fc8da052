"""What a configuration takes on a card, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmcap.planning.cards import GIB, Card
from vlmcap.planning.memory import Moment, activations, is_weight


@dataclass(frozen=True, slots=True)
class Change:
    """A way to make a configuration fit.

    Attributes:
        overrides: As `train.py` takes them.
        cost: What is lost by it, for people.
        peak_gib: With it, and with those in front of it in the list.
    """

    overrides: tuple[str, ...]
    cost: str
    peak_gib: float

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"overrides": list(self.overrides), "cost": self.cost, "peak_gib": round(self.peak_gib, 2)}


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory, time and disk of a configuration on its card.

    Attributes:
        title: What the model is made of.
        hardware: Name of the profile.
        card: Its figures.
        training: The fullest moment of a training step.
        generation: The fullest moment while captions are written.
        num_visual: Visual tokens of a clip.
        num_text: Text tokens of a clip, the longest caption included.
        batch_size: Clips a micro-batch.
        eval_batch_size: Clips that are captioned together.
        num_frames: Of a clip.
        flops: Of a clip in training.
        clip_s: Seconds a clip in training.
        caption_s: Seconds to caption a clip.
        token_s: Of them, of one token of a whole evaluation batch.
        num_clips: That an epoch and the store of features are counted for.
        cache_bytes: Of a clip's features on disk.
        download_bytes: Of the bases.
        is_cached: Features come from disk, and the encoder is not on the card.
        num_kept: Layers that are not computed again under hardware.activation_budget_gib.
        changes: That make it fit where it does not.
    """

    title: str
    hardware: str
    card: Card
    training: Moment
    generation: Moment
    num_visual: int
    num_text: int
    batch_size: int
    eval_batch_size: int
    num_frames: int
    flops: float
    clip_s: float
    caption_s: float
    token_s: float
    num_clips: int
    cache_bytes: float
    download_bytes: float
    is_cached: bool
    num_kept: int = 0
    changes: Sequence[Change] = ()

    def _gib(self, moment: Moment) -> float:
        return moment.total / GIB + self.card.context_gib

    @property
    def training_gib(self) -> float:
        """Peak of a training step, the context included."""
        return self._gib(self.training)

    @property
    def generation_gib(self) -> float:
        """Peak of generation, the context included."""
        return self._gib(self.generation)

    @property
    def peak_gib(self) -> float:
        """The higher of both."""
        return max(self.training_gib, self.generation_gib)

    @property
    def fits(self) -> bool:
        """Whether the card holds it."""
        return self.peak_gib <= self.card.usable_gib

    @property
    def weights_gib(self) -> float:
        """Weights of all kinds, quantisation state included."""
        return sum(size for name, size in self.training.parts.items() if is_weight(name)) / GIB

    @property
    def activations_gib(self) -> float:
        """What a training step adds to weights, gradients and optimiser state at its peak."""
        return activations(self.training) / GIB

    def plain(self) -> dict[str, Any]:
        """As `--json` prints it; GiB, seconds and bytes as the names say."""
        return {
            "model": self.title,
            "hardware": self.hardware,
            "fits": self.fits,
            "peak_gib": round(self.peak_gib, 3),
            "usable_gib": self.card.usable_gib,
            "training_gib": round(self.training_gib, 3),
            "generation_gib": round(self.generation_gib, 3),
            "weights_gib": round(self.weights_gib, 3),
            "activations_gib": round(self.activations_gib, 3),
            "context_gib": self.card.context_gib,
            "training": {"moment": self.training.name, "parts_gib": _rounded(self.training.parts)},
            "generation": {"moment": self.generation.name, "parts_gib": _rounded(self.generation.parts)},
            "visual_tokens": self.num_visual,
            "text_tokens": self.num_text,
            "batch_size": self.batch_size,
            "eval_batch_size": self.eval_batch_size,
            "num_frames": self.num_frames,
            "flops_per_clip": self.flops,
            "seconds_per_clip": round(self.clip_s, 4),
            "seconds_per_caption": round(self.caption_s, 4),
            "seconds_per_token": round(self.token_s, 6),
            "num_clips": self.num_clips,
            "seconds_per_epoch": round(self.clip_s * self.num_clips, 1),
            "cache_bytes": round(self.cache_bytes * self.num_clips),
            "download_bytes": round(self.download_bytes),
            "is_cached": self.is_cached,
            "calibrated": self.card.calibrated or None,
            "kept_layers": self.num_kept,
            "changes": [change.plain() for change in self.changes],
        }


def _rounded(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(size / GIB, 4) for name, size in parts.items()}
