"""Settings of the model and of what is trained in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vlmcap.config.checks import require, require_positive
from vlmcap.config.choices import EncoderTuning, ModelKind, ProjectorKind, Quantization, Queries, Reducer, Temporal


@dataclass
class ModelConfig:
    """Parts joined by us (`assembled`), or a whole pretrained vision-language model that brings its own."""

    name: str = MISSING
    kind: ModelKind = MISSING
    checkpoint: str = ""  # of a whole model: hub id or local folder in Hugging Face layout
    revision: str | None = None
    gate: str | None = None
    licence: str = ""
    # An outer <|vision_start|>…<|vision_end|> stands around Qwen3-VL's frames, as in its processor since transformers 5.10.
    use_outer_marks: bool = True
    chat_template: str | None = None  # what a whole model's own `llm` settings take over
    max_caption_tokens: int = 768
    max_new_tokens: int = 768
    align_lr: float = 1e-4
    projector_lr: float = 2e-5
    adapter_lr: float = 1e-4

    def __post_init__(self) -> None:
        is_read = self.use_outer_marks or self.kind is ModelKind.qwen3_vl
        require(is_read, f"model.use_outer_marks=false changes nothing in model={self.name}, only in Qwen3-VL; leave it out")


@dataclass
class EncoderConfig:
    """Vision encoder."""

    name: str = MISSING
    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout; a whole model's gives its vision tower
    revision: str | None = None  # branch, tag or commit on the hub
    feature_layer: int = -1  # index into the hidden states; -1 is after the last block, -2 before it
    image_size: int | None = None  # side of a frame in pixels; null is the checkpoint's own
    image_mean: list[float] | None = None  # per channel, of pixels in 0…1; null is what the checkpoint's processor file says
    image_std: list[float] | None = None  # standard deviation, likewise
    max_patches: int = 256  # patches a frame at most, where frames keep their aspect ratio (siglip2_naflex, Qwen-VL)
    tiling: int = 1  # tiles a frame is cut into at most, each encoded at full size with a thumbnail behind them; 1 cuts none
    is_cached: bool = False  # keep its features on disk unless cache.enabled says otherwise
    gate: str | None = None  # licence to accept on the hub before the download works
    licence: str = ""

    def __post_init__(self) -> None:
        require_positive("encoder", self, "max_patches", "tiling")
        require(self.image_size is None or self.image_size >= 1, f"encoder.image_size must be at least 1, not {self.image_size}")
        for key, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            require(values is None or len(values) == 3, f"encoder.{key} must have three numbers, one per channel, not {values}")
        require(self.image_std is None or min(self.image_std) > 0, f"encoder.image_std must be above 0, not {self.image_std}")


@dataclass
class ProjectorConfig:
    """Projector from vision to language width, trained in full."""

    name: str = MISSING
    kind: ProjectorKind = MISSING
    checkpoint: str | None = None  # start from this projector: a .ckpt of ours, or the folder of a LLaVA or InternVL checkpoint
    depth: int = 2  # linear layers of the MLP
    use_layer_norm: bool = False  # in front of the MLP
    hidden_dim: int | None = None  # inner width of what attends or convolves; null is the encoder's width
    num_layers: int = 2  # attention layers; convolutional blocks on each side of the C-Abstractor's pooling
    num_heads: int = 8
    queries: Queries = Queries.learned
    num_queries: int = 64  # a frame (cross_attention, c_abstractor) or a clip (perceiver)
    shuffle: int = 2  # patches a side that pixel_shuffle joins
    reducer: Reducer = Reducer.none
    pool_size: int = 2  # patches a side that reducer=pool averages
    resample_size: int = 12  # patches a side that reducer=resample leaves
    keep_ratio: float = 0.25  # share of tokens that reducer=merge and saliency leave
    frame_stack: int = 1  # consecutive frames whose features at one position become one token
    temporal: Temporal = Temporal.none
    window: int = 256  # tokens that temporal=local_global looks at on each side
    num_global: int = 8  # its global tokens

    def __post_init__(self) -> None:
        names = ("depth", "num_layers", "num_heads", "num_queries", "shuffle", "pool_size", "resample_size", "frame_stack", "window")
        require_positive("projector", self, *names)
        require(0 < self.keep_ratio <= 1, f"projector.keep_ratio must be above 0 and at most 1, not {self.keep_ratio}")
        require(self.num_global >= 0, f"projector.num_global must not be negative, not {self.num_global}")


@dataclass
class LoraConfig:
    """Low-rank adapters (peft)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Any = "all-linear"  # or names of the language model's modules, as a list or with commas between
    use_dora: bool = False  # weight-decomposed: https://arxiv.org/abs/2402.09353
    use_rslora: bool = False  # scaled by alpha / sqrt(rank): https://arxiv.org/abs/2312.03732
    use_experts: bool = False  # on the experts of a mixture-of-experts model too

    def __post_init__(self) -> None:
        require_positive("tuning.lora", self, "rank")
        targets = self.target_modules
        self.target_modules = ",".join(map(str, targets)) if isinstance(targets, list) else targets
        is_named = isinstance(self.target_modules, str) and bool(self.target_modules)
        require(is_named, f"tuning.lora.target_modules={targets} is not all-linear or a list of modules such as [q_proj,v_proj]")
        require(0 <= self.dropout < 1, f"tuning.lora.dropout must be in [0, 1), not {self.dropout}")


@dataclass
class LlmConfig:
    """Language model, frozen but for its adapters."""

    name: str = MISSING
    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout; a whole model's gives its language model
    revision: str | None = None
    quantization: Quantization = Quantization["none"]
    attention: str = "sdpa"  # auto (FlashAttention where it is installed and works, else sdpa) or a name of transformers
    chat_template: str | None = None  # in place of the tokenizer's, for models that carry none
    system_prompt: str | None = None
    prompt: str = "이 영상을 한국어로 자세히 설명해 주세요."
    enable_thinking: bool = False  # passed to the chat template of hybrid-thinking models
    max_caption_tokens: int = 768  # training captions are cut here, counted and said
    max_new_tokens: int = 768
    align_lr: float = 1e-3  # learning rates that suit its size: the projector alone,
    projector_lr: float = 1e-4  # the projector beside adapters,
    adapter_lr: float = 2e-4  # and the adapters; the stages of tuning read them
    reducer: Reducer = Reducer.none  # projector.reducer reads it: pool where the context is short
    gate: str | None = None
    licence: str = ""

    def __post_init__(self) -> None:
        require_positive("llm", self, "max_caption_tokens", "max_new_tokens")


@dataclass
class StageConfig:
    """One stage of tuning; a part is trained where its learning rate is above 0."""

    epochs: int = MISSING
    encoder_lr: float = 0.0  # what tuning.encoder names
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
    encoder: EncoderTuning = EncoderTuning.none
    encoder_lr: float = 2e-5  # the stages read it

    def __post_init__(self) -> None:
        if self.encoder is EncoderTuning.none:
            for stage in self.stages.values():
                stage.encoder_lr = 0.0
