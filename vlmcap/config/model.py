"""Settings of the model and of what is trained in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from vlmcap.config.checks import require, require_positive
from vlmcap.config.choices import EncoderFamily, ProjectorKind, Quantization, Reducer, Temporal


@dataclass
class EncoderConfig:
    """Vision encoder, frozen."""

    name: str = MISSING
    family: EncoderFamily = MISSING
    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout
    revision: str | None = None  # branch, tag or commit on the hub
    feature_layer: int = -1  # index into the hidden states; -1 is after the last block, -2 before it
    is_cached: bool = False  # keep its features on disk unless cache.enabled says otherwise
    gate: str | None = None  # licence to accept on the hub before the download works


@dataclass
class ProjectorConfig:
    """Projector from vision to language width, trained in full."""

    name: str = MISSING
    kind: ProjectorKind = MISSING
    depth: int = 2  # linear layers of the MLP
    reducer: Reducer = Reducer.none
    pool_size: int = 2  # patches a side that reducer=pool averages
    frame_stack: int = 1  # consecutive frames whose features at one position become one token
    temporal: Temporal = Temporal.none
    num_heads: int = 4  # of temporal=attention

    def __post_init__(self) -> None:
        require_positive("projector", self, "depth", "frame_stack", "pool_size")


@dataclass
class LoraConfig:
    """Low-rank adapters on the language model (peft)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"  # or a comma-separated list of module names

    def __post_init__(self) -> None:
        require_positive("tuning.lora", self, "rank")
        require(0 <= self.dropout < 1, f"tuning.lora.dropout must be in [0, 1), not {self.dropout}")


@dataclass
class LlmConfig:
    """Language model, frozen but for its adapters."""

    name: str = MISSING
    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout
    revision: str | None = None
    quantization: Quantization = Quantization["none"]
    attention: str = "sdpa"
    system_prompt: str | None = None
    prompt: str = "이 영상을 한국어로 자세히 설명해 주세요."
    enable_thinking: bool = False  # passed to the chat template of hybrid-thinking models
    max_caption_tokens: int = 768  # training captions are cut here, counted and said
    max_new_tokens: int = 768
    align_lr: float = 1e-3  # learning rates that suit its size: the projector alone,
    projector_lr: float = 1e-4  # the projector beside adapters,
    adapter_lr: float = 2e-4  # and the adapters; the stages of tuning read them
    gate: str | None = None

    def __post_init__(self) -> None:
        require_positive("llm", self, "max_caption_tokens", "max_new_tokens")


@dataclass
class StageConfig:
    """One stage of tuning; a part is trained where its learning rate is above 0."""

    epochs: int = MISSING
    projector_lr: float = 0.0
    adapter_lr: float = 0.0  # LoRA on the language model
    llm_lr: float = 0.0  # the language model's own weights
    warmup_ratio: float = 0.03  # share of the stage's steps with a rising rate; cosine decay after it
    final_lr_ratio: float = 0.0  # rate at the end of the stage over its peak

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"tuning.stages.*.epochs must not be negative, not {self.epochs}")
        require(0 <= self.warmup_ratio < 1, f"tuning.stages.*.warmup_ratio must be in [0, 1), not {self.warmup_ratio}")


@dataclass
class TuningConfig:
    """What is trained, in which order."""

    name: str = MISSING
    stages: dict[str, StageConfig] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)
    use_lora: bool = True
