"""Settings of the model: components that are assembled, or a pretrained vision-language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vlmcap.config.checks import follows, require, require_positive
from vlmcap.config.choices import Quantization, Reducer
from vlmcap.config.kinds import register

AUTO = "auto"  # value of a setting that is resolved from the data
UNKNOWN = "unknown"  # license of a checkpoint that states none
# Longest caption in tokens if there is no data: what Qwen3 needs for AI Hub's Korean captions of 575 characters.
ASSUMED_CAPTION_TOKENS = 768

KOREAN_PROMPT = "이 영상을 한국어로 자세히 설명해 주세요."
ENGLISH_PROMPT = "Describe this video in detail."


def _require_checkpoint(group: str, checkpoint: str) -> None:
    require(
        checkpoint.strip() != "",
        f"{group}.checkpoint is empty; set it to a hub id, or to a local folder in Hugging Face layout",
    )


@dataclass
class ModelConfig:
    """Where the three components of the model come from."""

    name: str = MISSING  # name of the model in titles and tables
    kind: str = MISSING  # kind of model, which selects the schema


@register("model")
@dataclass
class AssembledConfig(ModelConfig):
    """Encoder, projector and language model, each chosen by itself."""

    kind: str = "assembled"  # kind of model


@dataclass
class PretrainedVlmConfig(ModelConfig):
    """A pretrained vision-language model that brings all three components."""

    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout
    revision: str | None = None  # branch, tag or commit on the hub; null is the default branch
    gate: str | None = None  # license to accept on the hub before the download works
    license: str = ""  # license of the checkpoint

    def __post_init__(self) -> None:
        _require_checkpoint("model", self.checkpoint)


@register("model")
@dataclass
class FramesVlmConfig(PretrainedVlmConfig):
    """A pretrained VLM whose frames are squares of one size, such as LLaVA and InternVL."""

    kind: str = "frames"  # kind of model


@register("model")
@dataclass
class PatchesVlmConfig(PretrainedVlmConfig):
    """A pretrained VLM whose frames keep their aspect ratio, such as EXAONE 4.5."""

    kind: str = "patches"  # kind of model


@register("model")
@dataclass
class MropeVlmConfig(PatchesVlmConfig):
    """A pretrained VLM whose frames keep their aspect ratio, with positions in time, height and width: Qwen-VL."""

    kind: str = "mrope"  # kind of model


@register("model")
@dataclass
class TimedVlmConfig(MropeVlmConfig):
    """A pretrained VLM with positions in time, height and width that states times in its prompt: Qwen3-VL."""

    kind: str = "timed_mrope"  # kind of model
    # Enclose all frames in <|vision_start|>…<|vision_end|>, as the processor does since transformers 5.10.
    use_outer_marks: bool = True


@register("model")
@dataclass
class CustomVlmConfig(PretrainedVlmConfig):
    """A pretrained VLM of one of the kinds above, which is read from the checkpoint's `config.json`."""

    kind: str = "custom"  # kind of model


@dataclass
class EncoderConfig:
    """Settings of every vision encoder."""

    name: str = MISSING  # name of the encoder in titles and tables
    kind: str = MISSING  # kind of encoder, which selects the schema
    # Hub id or local folder in Hugging Face layout; of a model with text, only the vision tower is read.
    checkpoint: str = MISSING
    revision: str | None = None  # branch, tag or commit on the hub; null is the default branch
    is_cached: bool = False  # default of cache.enabled: store the features of this encoder on disk
    gate: str | None = None  # license to accept on the hub before the download works
    license: str = ""  # license of the checkpoint


@dataclass
class TowerConfig(EncoderConfig):
    """A vision tower of transformers."""

    feature_layer: int = -1  # index of the hidden states that are used; -1 is after the last block, -2 before it

    def __post_init__(self) -> None:
        _require_checkpoint("encoder", self.checkpoint)


@dataclass
class SquareEncoderConfig(TowerConfig):
    """Settings of a vision tower with frames of a fixed size."""

    image_size: int | None = follows("hardware.image_size", None)  # side of a frame in pixels; null is the checkpoint's
    # Mean per channel of pixels in [0, 1]; null is the value of the checkpoint's processor.
    image_mean: list[float] | None = None
    # Standard deviation per channel of pixels in [0, 1]; null is the value of the checkpoint's processor.
    image_std: list[float] | None = None
    # Largest number of tiles per frame, each encoded at image_size, followed by a thumbnail; 1 does not tile.
    tiling: int = 1

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
class PatchEncoderConfig(SquareEncoderConfig):
    """A vision tower with frames of a fixed size."""

    kind: str = "patches"  # kind of encoder
    # Second encoder, whose features are resampled to the grid of this one and concatenated along channels;
    # encoder=[NAME,NAME] sets it.
    join: SquareEncoderConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.join is None or max(self.tiling, self.join.tiling) == 1,
            "encoder.tiling splits frames, whose features cannot be joined with those of another encoder; set "
            "encoder.tiling=1",
        )


@register("encoder")
@dataclass
class NaflexEncoderConfig(TowerConfig):
    """SigLIP 2 NaFlex, in which frames keep their aspect ratio."""

    kind: str = "naflex"  # kind of encoder
    max_patches: int = 256  # largest number of patches per frame

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("encoder", self, "max_patches")


@register("encoder")
@dataclass
class NativeEncoderConfig(EncoderConfig):
    """The vision tower of a pretrained VLM."""

    kind: str = "native"  # kind of encoder
    checkpoint: str = follows("model.checkpoint", MISSING)  # hub id or local folder
    revision: str | None = follows("model.revision", None)  # branch, tag or commit on the hub
    gate: str | None = follows("model.gate", None)  # license to accept on the hub before the download works
    license: str = follows("model.license", "")  # license of the checkpoint
    # Largest number of patches per frame in the Qwen family: 448 × 448 pixels are 1024 patches of 14 × 14 pixels, and
    # 256 tokens for two frames.
    max_patches: int = 1024

    def __post_init__(self) -> None:
        require_positive("encoder", self, "max_patches")


@dataclass
class SuggestedConfig:
    """Defaults that the file of a language model suggests for other groups; they are not set on the command line."""

    align_lr: float = 1e-3  # learning rate of the projector when it is trained alone
    projector_lr: float = 1e-4  # learning rate of the projector when it is trained with adapters
    adapter_lr: float = 2e-4  # learning rate of the adapters
    lora_dropout: float = 0.0  # dropout of the adapters, 0 to 1
    reducer: Reducer = Reducer.none  # reducer of the projector; pool if the context is short


@register("llm")
@dataclass
class LlmConfig:
    """The language model."""

    name: str = MISSING  # name of the language model in titles and tables
    kind: str = "causal_lm"  # kind of language model
    checkpoint: str = MISSING  # hub id or local folder in Hugging Face layout
    revision: str | None = None  # branch, tag or commit on the hub; null is the default branch
    quantization: Quantization = follows("hardware.quantization", Quantization["none"])  # storage of frozen weights
    # Attention implementation: auto (FlashAttention if it is installed and works, else sdpa) or a name of transformers.
    attention: str = follows("hardware.attention", "sdpa")
    chat_template: str | None = None  # chat template in place of the tokenizer's, for models that have none
    system_prompt: str | None = None  # text of the system turn; null is the chat template's default
    prompt: str = AUTO  # question of the user turn; auto is Korean for captions that are mainly Hangul, else English
    enable_thinking: bool = False  # argument of the chat template of hybrid thinking models
    # Length in tokens to which training captions are truncated; auto fits the longest caption of the data.
    max_caption_tokens: Any = AUTO
    max_new_tokens: Any = AUTO  # largest number of generated tokens; auto fits the longest caption of the data
    suggested: SuggestedConfig = field(default_factory=SuggestedConfig)  # defaults for other groups
    gate: str | None = None  # license to accept on the hub before the download works
    license: str = ""  # license of the checkpoint

    def __post_init__(self) -> None:
        if type(self) in (LlmConfig, NativeLlmConfig):  # language models of plugins may need no checkpoint
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
                f"llm.{name} must be at least 1, or auto to fit the data, not {value}",
            )

    @property
    def question(self) -> str:
        """Question of the user turn; the Korean prompt until it is resolved from the data."""
        return KOREAN_PROMPT if self.prompt == AUTO else self.prompt

    @property
    def is_length_open(self) -> bool:
        """Whether the length of captions is not yet resolved from the data."""
        return AUTO in (self.max_caption_tokens, self.max_new_tokens)

    @property
    def caption_tokens(self) -> int:
        """Longest training caption in tokens; an assumption until it is resolved from the data."""
        return ASSUMED_CAPTION_TOKENS if self.max_caption_tokens == AUTO else int(self.max_caption_tokens)

    @property
    def new_tokens(self) -> int:
        """Longest generated caption in tokens; an assumption until it is resolved from the data."""
        return ASSUMED_CAPTION_TOKENS if self.max_new_tokens == AUTO else int(self.max_new_tokens)


@register("llm")
@dataclass
class NativeLlmConfig(LlmConfig):
    """The language model of a pretrained VLM."""

    kind: str = "native"  # kind of language model
    checkpoint: str = follows("model.checkpoint", MISSING)  # hub id or local folder
    revision: str | None = follows("model.revision", None)  # branch, tag or commit on the hub
    gate: str | None = follows("model.gate", None)  # license to accept on the hub before the download works
    license: str = follows("model.license", "")  # license of the checkpoint
    # Defaults for other groups.
    suggested: SuggestedConfig = field(
        default_factory=lambda: SuggestedConfig(align_lr=1e-4, projector_lr=2e-5, adapter_lr=1e-4)
    )
