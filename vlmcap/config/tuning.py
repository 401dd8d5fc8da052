"""Settings of tuning: what is trained, for how long, and at which learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vlmcap.config.checks import follows, only_with, require, require_positive
from vlmcap.config.choices import EncoderTuning
from vlmcap.config.kinds import register


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) by peft."""

    rank: int = 16  # rank of the adapters
    alpha: int = 32  # scale of the adapters, divided by their rank
    dropout: float = follows("llm.suggested.lora_dropout", 0.0)  # dropout of the adapters' input, 0 to 1
    # all-linear, or names of modules of the language model, as a list or separated by commas.
    target_modules: Any = "all-linear"
    use_dora: bool = False  # weight-decomposed adapters (DoRA): https://arxiv.org/abs/2402.09353
    use_rslora: bool = False  # scale by alpha / sqrt(rank) (rsLoRA): https://arxiv.org/abs/2312.03732
    use_experts: bool = False  # also put adapters on the experts of a mixture-of-experts model

    def __post_init__(self) -> None:
        require_positive("tuning.lora", self, "rank")
        targets = self.target_modules
        names = targets.split(",") if isinstance(targets, str) else targets
        self.target_modules = ",".join(str(name).strip() for name in names) if isinstance(names, list) else targets
        is_named = isinstance(self.target_modules, str) and bool(self.target_modules)
        require(
            is_named,
            f"tuning.lora.target_modules={targets} is neither all-linear nor a list of modules such as [q_proj,v_proj]",
        )
        require(0 <= self.dropout < 1, f"tuning.lora.dropout must be in [0, 1), not {self.dropout}")
        is_supported = not (self.use_dora and self.use_experts)
        require(
            is_supported,
            "tuning.lora.use_dora=true is not supported on experts; set tuning.lora.use_dora or "
            "tuning.lora.use_experts to false",
        )


@dataclass(frozen=True)
class Stage:
    """Epochs with one set of trained components; a component is trained if its peak learning rate is above 0.

    Attributes:
        epochs: Passes over the training clips.
        encoder_lr: Peak learning rate of the encoder's weights or adapters, as chosen by `tuning.encoder`.
        projector_lr: Peak learning rate of the projector.
        adapter_lr: Peak learning rate of the adapters on the language model.
        llm_lr: Peak learning rate of the language model's own weights.
        warmup_ratio: Share of the stage's steps with linear warm-up; a cosine decay follows.
        final_lr_ratio: Learning rate at the end of the stage, as a share of its peak.
    """

    epochs: int
    encoder_lr: float = 0.0
    projector_lr: float = 0.0
    adapter_lr: float = 0.0
    llm_lr: float = 0.0
    warmup_ratio: float = 0.03
    final_lr_ratio: float = 0.0


@dataclass
class TuningConfig:
    """Settings of every kind of tuning, which all train the projector."""

    name: str = MISSING  # name of the tuning in titles and tables
    kind: str = MISSING  # kind of tuning, which selects the schema
    epochs: int = 3  # passes over the training clips
    max_stage_epochs: int | None = None  # largest number of epochs per stage, for a short trial; null is no limit
    projector_lr: float = follows("llm.suggested.projector_lr", 1e-4)  # peak learning rate of the projector
    warmup_ratio: float = 0.03  # share of a stage's steps with linear warm-up, before the cosine decay
    final_lr_ratio: float = 0.0  # learning rate at the end of a stage, as a share of its peak

    @property
    def stages(self) -> dict[str, Stage]:
        """Stages by name, in order."""
        return {"tune": self._stage(self.epochs, projector_lr=self.projector_lr)}

    @property
    def use_lora(self) -> bool:
        """Whether the language model gets adapters."""
        return False

    @property
    def lora_rank(self) -> int:
        """Rank of the language model's adapters; 0 where it gets none."""
        return 0

    @property
    def encoder_tuning(self) -> EncoderTuning:
        """Which weights of the encoder are trained."""
        return EncoderTuning.none

    @property
    def num_epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.stages.values())

    def _stage(self, epochs: int, **rates: float) -> Stage:
        num_epochs = epochs if self.max_stage_epochs is None else min(epochs, self.max_stage_epochs)
        return Stage(num_epochs, warmup_ratio=self.warmup_ratio, final_lr_ratio=self.final_lr_ratio, **rates)

    def __post_init__(self) -> None:
        require_positive("tuning", self, "max_stage_epochs")
        for name in ("epochs", "align_epochs"):
            require(getattr(self, name, 0) >= 0, f"tuning.{name} must not be negative, not {getattr(self, name, 0)}")
        for name in ("projector_lr", "adapter_lr", "llm_lr", "align_lr", "encoder_lr"):
            require(getattr(self, name, 0) >= 0, f"tuning.{name} must not be negative, not {getattr(self, name, 0)}")
        require(0 <= self.warmup_ratio < 1, f"tuning.warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        require(0 <= self.final_lr_ratio <= 1, f"tuning.final_lr_ratio must be in [0, 1], not {self.final_lr_ratio}")


@register("tuning")
@dataclass
class ProjectorOnlyConfig(TuningConfig):
    """Trains the projector alone, with a frozen encoder and language model."""

    kind: str = "projector_only"  # kind of tuning
    projector_lr: float = follows("llm.suggested.align_lr", 1e-3)  # peak learning rate of the projector

    @property
    def stages(self) -> dict[str, Stage]:
        """The single stage."""
        return {"align": self._stage(self.epochs, projector_lr=self.projector_lr)}


@dataclass
class EncoderTuningConfig(TuningConfig):
    """Settings of tuning that can also train the encoder."""

    encoder: EncoderTuning = EncoderTuning.none  # which weights of the encoder are trained
    # Peak learning rate of the encoder's weights or adapters.
    encoder_lr: float = only_with("encoder=lora", lambda c: c.encoder is not EncoderTuning.none, 2e-5)
    lora: LoraConfig = field(default_factory=LoraConfig)  # adapters

    @property
    def encoder_tuning(self) -> EncoderTuning:
        """Which weights of the encoder are trained."""
        return self.encoder

    @property
    def _encoder_lr(self) -> float:
        return 0.0 if self.encoder is EncoderTuning.none else self.encoder_lr


@register("tuning")
@dataclass
class FullConfig(EncoderTuningConfig):
    """Trains the projector and all weights of the language model."""

    kind: str = "full"  # kind of tuning
    llm_lr: float = 2e-5  # peak learning rate of the language model's weights

    @property
    def stages(self) -> dict[str, Stage]:
        """The single stage."""
        rates = {"encoder_lr": self._encoder_lr, "projector_lr": self.projector_lr, "llm_lr": self.llm_lr}
        return {"tune": self._stage(self.epochs, **rates)}


@register("tuning")
@dataclass
class LoraTuningConfig(EncoderTuningConfig):
    """Trains the projector and LoRA adapters on the language model, from the first step."""

    kind: str = "lora"  # kind of tuning
    adapter_lr: float = follows("llm.suggested.adapter_lr", 2e-4)  # peak learning rate of the adapters

    @property
    def use_lora(self) -> bool:
        """Whether the language model gets adapters."""
        return True

    @property
    def lora_rank(self) -> int:
        """Rank of the language model's adapters."""
        return self.lora.rank

    @property
    def stages(self) -> dict[str, Stage]:
        """The single stage."""
        return {"tune": self._stage(self.epochs, **self._rates)}

    @property
    def _rates(self) -> dict[str, float]:
        return {"encoder_lr": self._encoder_lr, "projector_lr": self.projector_lr, "adapter_lr": self.adapter_lr}


@register("tuning")
@dataclass
class TwoStageConfig(LoraTuningConfig):
    """Trains the projector alone at a high learning rate, then the projector together with LoRA adapters."""

    kind: str = "two_stage"  # kind of tuning
    epochs: int = 4  # epochs of both stages together
    align_epochs: int = 1  # epochs of the first stage
    align_lr: float = follows("llm.suggested.align_lr", 1e-3)  # peak learning rate of the projector in the first stage

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages `align` and `tune`."""
        return {
            "align": self._stage(self.align_epochs, projector_lr=self.align_lr),
            "tune": self._stage(self.epochs - self.align_epochs, **self._rates),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        is_possible = self.align_epochs <= self.epochs
        require(
            is_possible,
            f"tuning.align_epochs={self.align_epochs} must not be above tuning.epochs={self.epochs}, which counts both "
            "stages",
        )
