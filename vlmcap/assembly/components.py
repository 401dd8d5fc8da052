"""Each part of a model out of its configuration, and the frozen bases that it comes from."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.config import (
    Config,
    EncoderTuning,
    EncoderTuningConfig,
    LoraConfig,
    NaflexEncoderConfig,
    NativeEncoderConfig,
    PatchEncoderConfig,
    PixelShuffleConfig,
    Precision,
    Qwen3VlConfig,
    Reducer,
    Strategy,
    Temporal,
    TokenProjectorConfig,
)
from vlmcap.config.kinds import maker_of
from vlmcap.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlmcap.models.checkpoint import Fingerprint
    from vlmcap.models.encoders import EncoderOptions, VisionEncoder
    from vlmcap.models.llm.prompt import PromptEncoder
    from vlmcap.models.pretrained import VlmComponents
    from vlmcap.models.projectors import ProjectorSizes


@dataclass(frozen=True, slots=True)
class BaseCheckpoints:
    """Where the frozen bases are, and what they hold: `encoder` and `llm`, or `model` where one brings both."""

    folders: dict[str, Path]
    bases: dict[str, Fingerprint]


def locate_base_checkpoints(config: Config, *, is_encoder_only: bool = False) -> BaseCheckpoints:
    """Finds the bases and takes their fingerprints.

    Args:
        config: Of the run.
        is_encoder_only: The language model is not looked for where it is a base of its own.

    Raises:
        UserError: A checkpoint is not there.
    """
    from vlmcap.models.checkpoint import VISION, Fingerprint, fingerprint, locate

    memo = Path(config.paths.cache_dir) / "fingerprints.json"
    folders: dict[str, Path] = {}
    bases: dict[str, Fingerprint] = {}
    parts = ("encoder",) if is_encoder_only else ("encoder", "llm")
    for part in ("model",) if config.is_pretrained_vlm else parts:
        settings, wanted = getattr(config, part), VISION if part == "encoder" else None
        if part == "encoder" and has_plugin_encoder(config):
            if not settings.checkpoint:
                folders[part], bases[part] = (
                    Path(),
                    Fingerprint(settings.kind, "", hashlib.sha256(settings.kind.encode()).hexdigest()),
                )
                continue
            wanted = None
        folders[part] = locate(
            settings.checkpoint, settings.revision, key=f"{part}.checkpoint", gate=settings.gate, part=wanted
        )
        bases[part] = fingerprint(folders[part], settings.checkpoint, memo, wanted)
    return BaseCheckpoints(folders, bases)


def vision_component(config: Config) -> str:
    """The base that the vision encoder comes from."""
    return "model" if config.is_pretrained_vlm else "encoder"


def dtype_of(precision: Precision) -> torch.dtype:
    """Type of frozen weights and of arithmetic on them."""
    import torch

    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}[precision]


def autocast_dtype(config: Config) -> torch.dtype | None:
    """Type of the arithmetic under autocast; None without it."""
    precision = config.hardware.precision
    return None if precision is Precision.fp32 else dtype_of(precision)


def device_of(config: Config) -> str:
    """Where weights are put while they are read."""
    import torch

    if config.hardware.accelerator == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(
            f"hardware={config.hardware.name} needs a CUDA device and there is none; use hardware=cpu, or check the "
            "driver"
        )
    return f"cuda:{torch.cuda.current_device()}"


def encoder_options(config: Config) -> EncoderOptions:
    """What the encoder is asked for beside its checkpoint."""
    from vlmcap.models.encoders import EncoderOptions

    settings = config.encoder
    if isinstance(settings, NaflexEncoderConfig):
        chosen: dict[str, Any] = {"max_patches": settings.max_patches}
    else:
        assert isinstance(settings, PatchEncoderConfig), "a pretrained VLM has no options for its tower"
        chosen = {"image_size": settings.image_size, "max_tiles": settings.tiling}
        chosen |= {key: tuple(values) for key in ("mean", "std") if (values := getattr(settings, f"image_{key}"))}
    return EncoderOptions(
        feature_layer=settings.feature_layer,
        dtype=dtype_of(config.hardware.precision),
        **chosen,
        attention=tower_attention(config),
    )


def tower_attention(config: Config) -> str:
    """Attention of a vision tower: FlashAttention where the hardware's `auto` finds it."""
    import torch

    from vlmcap.models.llm.attention import choose_attention

    # The plan and the tables build encoders for GPUs that are not there.
    device = device_of(config) if torch.cuda.is_available() else "cpu"
    return (
        choose_attention("auto", device, dtype_of(config.hardware.precision))
        if config.hardware.attention == "auto"
        else "sdpa"
    )


def has_plugin_encoder(config: Config) -> bool:
    """Whether the encoder is a plugin's."""
    return maker_of("encoder", config.encoder.kind) is not None


def plugin_encoder(config: Config, folder: Path | None) -> VisionEncoder:
    """The encoder of a plugin, frozen; with random weights where there is no folder."""
    made: VisionEncoder = maker_of("encoder", config.encoder.kind)(
        config.encoder, folder if config.encoder.checkpoint else None
    )
    return made.to(dtype_of(config.hardware.precision)).requires_grad_(False).eval()


def max_patches(config: Config) -> int:
    """Patches per frame at most, of a pretrained VLM."""
    assert isinstance(config.encoder, NativeEncoderConfig)
    return config.encoder.max_patches


def load_encoder(config: Config, folder: Path) -> VisionEncoder:
    """The vision encoder, frozen; of a whole model it alone is read."""
    if has_plugin_encoder(config):
        return plugin_encoder(config, folder)
    if not config.is_pretrained_vlm:
        from vlmcap.models import encoders

        is_on_host = config.trainer.strategy is Strategy.fsdp2  # it is cut into shards
        return encoders.load_encoder(folder, encoder_options(config), "cpu" if is_on_host else device_of(config))
    from vlmcap.models import pretrained

    options = {name: value for name, value in language_options(config).items() if name != "quantization"}
    encoder: VisionEncoder = pretrained.load_vision(
        config.model.kind, folder, max_patches=max_patches(config), **options
    )
    return encoder


def build_meta_encoder(config: Config, folder: Path) -> VisionEncoder:
    """The vision encoder without its weights, on the meta device: its sizes and its transform."""
    if has_plugin_encoder(config):
        import torch

        with torch.device("meta"):
            return plugin_encoder(config, None)
    if not config.is_pretrained_vlm:
        from vlmcap.models import encoders

        return encoders.build_meta_encoder(folder, encoder_options(config))
    from vlmcap.models import pretrained

    encoder: VisionEncoder = pretrained.build_meta_vision(
        config.model.kind, folder, dtype=dtype_of(config.hardware.precision), max_patches=max_patches(config)
    )
    return encoder


def train_encoder(config: Config, encoder: Any) -> None:
    """Thaws the encoder, or puts adapters on it, as `tuning.encoder` says."""
    tuning = config.tuning.encoder_tuning
    if tuning is EncoderTuning.none:
        return
    lora = lora_of(config)
    if tuning is EncoderTuning.full:
        encoder.float().requires_grad_(True)  # mixed precision wants float32 masters
    else:
        from vlmcap.models.encoders.tower import add_tower_lora

        add_tower_lora(encoder.tower, lora)
    if config.hardware.gradient_checkpointing and encoder.tower.supports_gradient_checkpointing:
        encoder.tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def lora_of(config: Config) -> LoraConfig:
    """Settings of the adapters, for a tuning that has any."""
    assert isinstance(config.tuning, EncoderTuningConfig)
    return config.tuning.lora


def uses_expert_adapters(config: Config) -> bool:
    """Whether the experts of the language model get adapters."""
    return config.tuning.use_lora and lora_of(config).use_experts


def projector_sizes(config: Config, encoder: Any, out_dim: int, num_prompt_tokens: int) -> ProjectorSizes:
    """What encoder, clips and language model make of the projector.

    Raises:
        UserError: The projector cannot take all clips that the encoder may give.
    """
    from vlmcap.models.projectors import ProjectorSizes

    settings, grids = config.projector, encoder.possible_grids(config.data.num_frames)
    _check_tiling(config)
    if isinstance(settings, PixelShuffleConfig) and len({(height, width) for _, height, width in grids}) > 1:
        raise UserError(
            f"projector={settings.name} joins patches {settings.shuffle} by {settings.shuffle}, and the grids of "
            f"encoder={config.encoder.name} vary with the clip, so they do not always divide; choose another "
            "projector or encoder"
        )
    most_frames = max(frames for frames, _, _ in grids)
    return ProjectorSizes(encoder.embed_dim, out_dim, encoder.grid, most_frames, num_prompt_tokens)


def _check_tiling(config: Config) -> None:
    projector, encoder = config.projector, config.encoder
    if not (isinstance(projector, TokenProjectorConfig) and isinstance(encoder, PatchEncoderConfig)):
        return
    tiling = encoder.tiling
    wrong = {
        f"frame_stack={projector.frame_stack}": projector.frame_stack > 1,
        f"temporal={projector.temporal.name}": projector.temporal in (Temporal.attention, Temporal.position),
        "reducer=saliency": projector.reducer is Reducer.saliency,
    }
    key = next((key for key, is_wrong in wrong.items() if is_wrong), None)
    if tiling > 1 and key:
        raise UserError(
            f"projector.{key} compares places of frames, which encoder.tiling={tiling} cuts into tiles of their own; "
            "set encoder.tiling=1, or projector.frame_stack=1, projector.temporal=none and another projector.reducer"
        )


def load_prompt_of(config: Config, folder: Path, **around: str) -> PromptEncoder:
    """The language model's tokenizer with the prompt.

    `around` is text that stands directly around the visual tokens.
    """
    from vlmcap.models.llm.prompt import load_prompt

    return load_prompt(folder, config.llm, **around)


def language_options(config: Config) -> dict[str, Any]:
    """How a language model's weights are stored and computed with."""
    quantization = config.llm.quantization.value
    if quantization != "none" and any(stage.llm_lr > 0 for stage in config.tuning.stages.values()):
        raise UserError(
            f"tuning={config.tuning.name} trains the language model's own weights, which "
            f"llm.quantization={quantization} forbids; "
            "set llm.quantization=none"
        )
    return {
        "dtype": dtype_of(config.hardware.precision),
        "quantization": quantization,
        "attention": config.llm.attention,
        "device": device_of(config),
    }


def load_llm(config: Config, folder: Path, *, is_meta: bool = False) -> nn.Module:
    """The language model, frozen; without weights, on the meta device, where `is_meta`."""
    from vlmcap.models.llm.load import build_meta_language_model, load_language_model

    if own := maker_of("llm", config.llm.kind):
        import torch

        with torch.device("meta") if is_meta else contextlib.nullcontext():
            made: nn.Module = own(config.llm, folder, **language_options(config))
        return made.requires_grad_(False)
    if is_meta:
        options = {name: value for name, value in language_options(config).items() if name != "quantization"}
        return build_meta_language_model(folder, **options)
    return load_language_model(folder, is_on_host=config.trainer.strategy is Strategy.fsdp2, **language_options(config))


def load_vlm(config: Config, folder: Path) -> VlmComponents:
    """The parts of a whole pretrained model, frozen but for its projector."""
    from vlmcap.models.pretrained import load_pretrained

    return load_pretrained(
        config.model.kind,
        folder,
        max_patches=max_patches(config),
        use_outer_marks=_uses_outer_marks(config),
        is_on_host=config.trainer.strategy is Strategy.fsdp2,
        **language_options(config),
    )


def build_meta_vlm(config: Config, folder: Path) -> VlmComponents:
    """The same parts without weights, on the meta device, and without the layout that needs a tokenizer."""
    import torch

    from vlmcap.models.encoders.tower import read_config
    from vlmcap.models.pretrained import build_pretrained

    with torch.device("meta"):
        return build_pretrained(
            config.model.kind,
            read_config(folder),
            dtype=dtype_of(config.hardware.precision),
            max_patches=max_patches(config),
            use_outer_marks=_uses_outer_marks(config),
        )


def _uses_outer_marks(config: Config) -> bool:
    return config.model.use_outer_marks if isinstance(config.model, Qwen3VlConfig) else True


def loss_chunk_bytes(config: Config) -> int | None:
    """Bytes of float32 logits that the loss may have at once; None for all."""
    size_mib = config.hardware.loss_chunk_mib
    return None if size_mib is None else size_mib * 2**20


def add_adapters(config: Config, llm: nn.Module, num_kept: int = 0) -> nn.Module:
    """The language model with adapters, thawed, or as it is, as tuning says.

    Args:
        config: Of the run.
        llm: Changed in place.
        num_kept: Layers whose activations are kept although others are computed again.
    """
    from vlmcap.models.llm.adapt import add_lora
    from vlmcap.models.llm.layers import checkpoint_layers

    if config.hardware.gradient_checkpointing:
        checkpoint_layers(llm, is_offloaded=config.hardware.offload_checkpoints, num_kept=num_kept)
    if any(stage.llm_lr > 0 for stage in config.tuning.stages.values()):
        llm.float().requires_grad_(True)  # mixed precision wants float32 masters
    if not config.tuning.use_lora:
        return llm
    adapted: nn.Module = add_lora(llm, lora_of(config))
    return adapted


def compile_blocks(config: Config, llm: nn.Module) -> None:
    """Compiles the language model's blocks where `hardware.compile` says so.

    A plan's hollow model is never compiled.
    """
    from vlmcap.models.llm.layers import compile_layers

    if config.hardware.compile:
        compile_layers(llm)
