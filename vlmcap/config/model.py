"""The model: parts that are joined here, or a whole pretrained vision-language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vlmcap.config.checks import follows, require, require_positive
from vlmcap.config.choices import Quantization, Reducer
from vlmcap.config.kinds import register

AUTO = "auto"  # value of a setting that the data decides
UNKNOWN = "unknown"  # license of a checkpoint that does not state one
ASSUMED_CAPTION_TOKENS = (
    768  # of the longest caption, where the data is not there: Qwen3's for AI Hub's Korean captions of 575 characters
)

KOREAN_PROMPT = "이 영상을 한국어로 자세히 설명해 주세요."
ENGLISH_PROMPT = "Describe this video in detail."


def _require_checkpoint(group: str, checkpoint: str) -> None:
    require(
        checkpoint.strip() != "",
        f"{group}.checkpoint is empty; set it to a hub id, or to a local folder in Hugging Face layout",
    )


@dataclass
class ModelConfig:
    """Where the three parts come from."""

    name: str = MISSING
    kind: str = MISSING


@register("model")
@dataclass
class AssembledConfig(ModelConfig):
    """Encoder, projector and language model, each by its own name."""

    kind: str = "assembled"


@dataclass
class PretrainedVlmConfig(ModelConfig):
    """A pretrained vision-language model that brings all three parts."""

    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout
    revision: str | None = None  # branch, tag or commit on the hub
    gate: str | None = None  # license to accept on the hub before the download works
    license: str = ""

    def __post_init__(self) -> None:
        _require_checkpoint("model", self.checkpoint)


@register("model")
@dataclass
class LlavaNextVideoConfig(PretrainedVlmConfig):
    """LLaVA-NeXT-Video."""

    kind: str = "llava_next_video"


@register("model")
@dataclass
class Qwen2VlConfig(PretrainedVlmConfig):
    """Qwen2-VL."""

    kind: str = "qwen2_vl"


@register("model")
@dataclass
class Qwen25VlConfig(PretrainedVlmConfig):
    """Qwen2.5-VL."""

    kind: str = "qwen2_5_vl"


@register("model")
@dataclass
class Qwen3VlConfig(PretrainedVlmConfig):
    """Qwen3-VL."""

    kind: str = "qwen3_vl"
    # An outer <|vision_start|>…<|vision_end|> stands around the frames, as in its processor since transformers 5.10.
    use_outer_marks: bool = True


@register("model")
@dataclass
class CustomVlmConfig(PretrainedVlmConfig):
    """A pretrained VLM of one of the classes above; which one, its checkpoint says."""

    kind: str = "custom"


@dataclass
class EncoderConfig:
    """What every vision encoder has."""

    name: str = MISSING
    kind: str = MISSING
    checkpoint: str = (
        MISSING  # hub id or local folder in Hugging Face layout; of a whole model's the vision tower is taken
    )
    revision: str | None = None  # branch, tag or commit on the hub
    is_cached: bool = False  # keep its features on disk unless cache.enabled says otherwise
    gate: str | None = None  # license to accept on the hub before the download works
    license: str = ""


@dataclass
class TowerConfig(EncoderConfig):
    """A vision tower of transformers."""

    feature_layer: int = -1  # index into the hidden states; -1 is after the last block, -2 before it

    def __post_init__(self) -> None:
        _require_checkpoint("encoder", self.checkpoint)


@register("encoder")
@dataclass
class PatchEncoderConfig(TowerConfig):
    """A vision tower on frames of one size."""

    kind: str = "patches"
    image_size: int | None = follows(
        "hardware.image_size", None
    )  # side of a frame in pixels; null is the checkpoint's own
    image_mean: list[float] | None = (
        None  # per channel, of pixels in 0…1; null is what the checkpoint's processor file says
    )
    image_std: list[float] | None = None  # standard deviation, likewise
    tiling: int = (
        1  # tiles that a frame is cut into at most, each encoded at full size with a thumbnail behind them; 1 cuts none
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("encoder", self, "image_size", "tiling")
        for key, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            require(
                values is None or len(values) == 3,
                f"encoder.{key} must have three numbers, one per channel, not {values}",
            )
        require(
            self.image_std is None or min(self.image_std) > 0,
            f"encoder.image_std must be above 0, not {self.image_std}",
        )


@register("encoder")
@dataclass
class NaflexEncoderConfig(TowerConfig):
    """SigLIP 2 NaFlex: frames keep their aspect ratio."""

    kind: str = "naflex"
    max_patches: int = 256  # per frame at most

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("encoder", self, "max_patches")


@register("encoder")
@dataclass
class NativeEncoderConfig(EncoderConfig):
    """The vision tower of a pretrained VLM."""

    kind: str = "native"
    checkpoint: str = follows("model.checkpoint", MISSING)
    revision: str | None = follows("model.revision", None)
    gate: str | None = follows("model.gate", None)
    license: str = follows("model.license", "")
    # Patches per frame at most, for the Qwen family: 448 × 448 pixels of 14 × 14, and 256 tokens for two frames.
    max_patches: int = 1024

    def __post_init__(self) -> None:
        require_positive("encoder", self, "max_patches")


@dataclass
class SuggestedConfig:
    """What the file of a language model proposes to other groups; it is not set on the command line."""

    align_lr: float = 1e-3  # learning rates that suit its size: the projector alone,
    projector_lr: float = 1e-4  # the projector beside adapters,
    adapter_lr: float = 2e-4  # and the adapters
    reducer: Reducer = Reducer.none  # of the projector: pool where the context is short


@register("llm")
@dataclass
class LlmConfig:
    """Language model, frozen but for its adapters."""

    name: str = MISSING
    kind: str = "causal_lm"
    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout
    revision: str | None = None  # branch, tag or commit on the hub
    quantization: Quantization = follows("hardware.quantization", Quantization["none"])
    # auto (FlashAttention where it is installed and works, else sdpa) or a name that transformers knows
    attention: str = follows("hardware.attention", "sdpa")
    chat_template: str | None = None  # in place of the tokenizer's, for models that carry none
    system_prompt: str | None = None
    prompt: str = AUTO  # auto asks in Korean where the captions of the data are mainly Hangul, and in English elsewhere
    enable_thinking: bool = False  # passed to the chat template of hybrid-thinking models
    max_caption_tokens: Any = AUTO  # training captions are cut here; auto is what the longest caption of the data needs
    max_new_tokens: Any = AUTO  # the same of captions that are written
    suggested: SuggestedConfig = field(default_factory=SuggestedConfig)
    gate: str | None = None  # license to accept on the hub before the download works
    license: str = ""

    def __post_init__(self) -> None:
        if type(self) in (LlmConfig, NativeLlmConfig):  # a plugin's may need none
            _require_checkpoint("llm", self.checkpoint)
        require(
            self.attention != "",
            "llm.attention is empty; set it to auto, sdpa or another implementation of transformers",
        )
        for name in ("max_caption_tokens", "max_new_tokens"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(
                is_count or value == AUTO,
                f"llm.{name} must be at least 1, or auto for what the data needs, not {value}",
            )

    @property
    def question(self) -> str:
        """What the user's turn asks; the Korean prompt as long as the data has not decided it."""
        return KOREAN_PROMPT if self.prompt == AUTO else self.prompt

    @property
    def is_length_open(self) -> bool:
        """Whether the data still has to decide how long captions may be."""
        return AUTO in (self.max_caption_tokens, self.max_new_tokens)

    @property
    def caption_tokens(self) -> int:
        """Longest training caption in tokens; an assumption as long as the data has not decided it."""
        return ASSUMED_CAPTION_TOKENS if self.max_caption_tokens == AUTO else int(self.max_caption_tokens)

    @property
    def new_tokens(self) -> int:
        """Longest written caption in tokens; an assumption as long as the data has not decided it."""
        return ASSUMED_CAPTION_TOKENS if self.max_new_tokens == AUTO else int(self.max_new_tokens)


@register("llm")
@dataclass
class NativeLlmConfig(LlmConfig):
    """The language model of a pretrained VLM."""

    kind: str = "native"
    checkpoint: str = follows("model.checkpoint", MISSING)
    revision: str | None = follows("model.revision", None)
    gate: str | None = follows("model.gate", None)
    license: str = follows("model.license", "")
    suggested: SuggestedConfig = field(
        default_factory=lambda: SuggestedConfig(align_lr=1e-4, projector_lr=2e-5, adapter_lr=1e-4)
    )
