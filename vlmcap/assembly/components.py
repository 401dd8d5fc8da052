"""Builds and loads each component of a model from its configuration and its base checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlmcap.assembly.base_checkpoints import ENCODER_KEYS, encoder_configs, vision_component
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
    Reducer,
    Strategy,
    Temporal,
    TimedVlmConfig,
    TokenProjectorConfig,
)
from vlmcap.config.kinds import maker_of
from vlmcap.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlmcap.models.encoders import EncoderOptions, VisionEncoder
    from vlmcap.models.llm.prompt import PromptEncoder
    from vlmcap.models.pretrained import VlmComponents
    from vlmcap.models.projectors import ProjectorSizes


def dtype_of(precision: Precision) -> torch.dtype:
    """Returns the dtype of frozen weights and of their computation."""
    import torch

    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}[precision]


def autocast_dtype(config: Config) -> torch.dtype | None:
    """Returns the dtype of autocast, or None without it."""
    precision = config.hardware.precision
    return None if precision is Precision.fp32 else dtype_of(precision)


def device_of(config: Config) -> str:
    """Returns the device on which weights are loaded.

    Raises:
        UserError: The hardware is a GPU, but there is none.
    """
    import torch

    if config.hardware.accelerator == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(
            f"hardware={config.hardware.name} needs a CUDA device, but there is none; set hardware=cpu, or check the "
            "driver"
        )
    return f"cuda:{torch.cuda.current_device()}"


def encoder_options(config: Config) -> EncoderOptions:
    """Returns the options of the encoder in addition to its checkpoint."""
    from vlmcap.models.encoders import EncoderOptions

    settings = config.encoder
    # NaFlex keeps the aspect ratio of frames under a budget of patches; the other encoders have a fixed square input.
    if isinstance(settings, NaflexEncoderConfig):
        chosen: dict[str, Any] = {"max_patches": settings.max_patches}
    else:
        assert isinstance(settings, PatchEncoderConfig), "a pretrained VLM has no options for its tower"
        chosen = {"image_size": settings.image_size, "max_tiles": settings.tiling}
        # Without these keys, mean and standard deviation come from the checkpoint's image processor.
        chosen |= {key: tuple(values) for key in ("mean", "std") if (values := getattr(settings, f"image_{key}"))}
    return EncoderOptions(
        feature_layer=settings.feature_layer,
        dtype=dtype_of(config.hardware.precision),
        **chosen,
        attention=tower_attention(config),
    )


def tower_attention(config: Config) -> str:
    """Returns the attention of a vision tower: FlashAttention if `hardware.attention=auto` finds it, else sdpa."""
    import torch

    from vlmcap.models.llm.attention import choose_attention

    # Plans and tables build encoders for GPUs that this machine may not have.
    device = device_of(config) if torch.cuda.is_available() else "cpu"
    if config.hardware.attention == "auto":
        return choose_attention("auto", device, dtype_of(config.hardware.precision))
    return "sdpa"


def max_patches(config: Config) -> int:
    """Returns the largest number of patches per frame of a pretrained VLM."""
    assert isinstance(config.encoder, NativeEncoderConfig)
    return config.encoder.max_patches


def load_encoder(config: Config, folders: Mapping[str, Path], *, is_meta: bool = False) -> VisionEncoder:
    """Loads the frozen vision encoder; of a pretrained VLM, only the vision tower is read.

    Args:
        config: Run configuration.
        folders: Folders of the base checkpoints.
        is_meta: Whether to build the encoder on the meta device, for its sizes and its transform.
    """
    # 1. Two joined encoders are loaded one by one.
    if len(configs := encoder_configs(config)) > 1:
        from vlmcap.models.encoders.joined import JoinedEncoder

        folders_of_encoders = ({"encoder": folders[key]} for key in ENCODER_KEYS)
        joined: Any = JoinedEncoder(*map(partial(load_encoder, is_meta=is_meta), configs, folders_of_encoders))
        return cast("VisionEncoder", joined)
    folder, dtype = folders.get(vision_component(config), Path()), dtype_of(config.hardware.precision)
    encoder: VisionEncoder
    # 2. The encoder of a plugin has random weights if it has no checkpoint.
    if build := maker_of("encoder", config.encoder.kind):
        import torch

        with torch.device("meta") if is_meta else contextlib.nullcontext():
            encoder = build(config.encoder, folder if config.encoder.checkpoint and not is_meta else None)
        return encoder.to(dtype).requires_grad_(False).eval()
    # 3. The vision tower of a pretrained VLM.
    if config.is_pretrained_vlm:
        from vlmcap.models import pretrained

        pretrained.check_kind(config.model.kind, folder)
        if is_meta:
            encoder = pretrained.build_meta_vision(folder, dtype=dtype, max_patches=max_patches(config))
        else:
            options = {name: value for name, value in language_options(config).items() if name != "quantization"}
            encoder = pretrained.load_vision(folder, max_patches=max_patches(config), **options)
        return encoder
    # 4. A tower of transformers.
    from vlmcap.models import encoders

    if is_meta:
        return encoders.build_meta_encoder(folder, encoder_options(config))
    is_on_host = config.trainer.strategy is Strategy.fsdp2  # it will be sharded
    return encoders.load_encoder(folder, encoder_options(config), "cpu" if is_on_host else device_of(config))


def train_encoder(config: Config, encoder: Any) -> None:
    """Unfreezes the encoder or adds adapters to it, according to `tuning.encoder`."""
    tuning = config.tuning.encoder_tuning
    if tuning is EncoderTuning.none:
        return
    lora = lora_of(config)
    # `parts` are the two encoders of a joined one.
    for one in getattr(encoder, "encoders", (encoder,)):
        if tuning is EncoderTuning.full:
            one.float().requires_grad_(True)  # mixed precision needs float32 master weights
        else:
            from vlmcap.models.encoders.tower import add_tower_lora

            add_tower_lora(one.tower, lora)
        if config.hardware.gradient_checkpointing and one.tower.supports_gradient_checkpointing:
            one.tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def lora_of(config: Config) -> LoraConfig:
    """Returns the settings of the adapters of a tuning that has some."""
    assert isinstance(config.tuning, EncoderTuningConfig)
    return config.tuning.lora


def uses_expert_adapters(config: Config) -> bool:
    """Returns whether the experts of the language model have adapters."""
    return config.tuning.use_lora and lora_of(config).use_experts


def projector_sizes(config: Config, encoder: Any, out_dim: int, num_prompt_tokens: int) -> ProjectorSizes:
    """Returns the sizes of the projector, which follow from encoder, clips and language model.

    Args:
        config: Run configuration.
        encoder: Vision encoder, on any device.
        out_dim: Dl, width of the language model.
        num_prompt_tokens: Number of tokens of the question.

    Raises:
        UserError: The projector does not support the features of the encoder.
    """
    from vlmcap.models.projectors import ProjectorSizes

    settings, grids = config.projector, encoder.possible_grids(config.data.num_frames)
    _check_tiling(config)
    # NaFlex grids depend on the frame size, so that a row or column can be left over.
    if isinstance(settings, PixelShuffleConfig) and len({(height, width) for _, height, width in grids}) > 1:
        raise UserError(
            f"projector={settings.name} joins patches {settings.shuffle} by {settings.shuffle}, but the grids of "
            f"encoder={config.encoder.name} vary with the clip and are not always divisible; choose another projector "
            "or encoder"
        )
    most_frames = max(frames for frames, _, _ in grids)
    # A Qwen-VL tower merges two frames into one token; most encoders have no such attribute.
    joined = getattr(encoder, "frames_per_token", 1)
    return ProjectorSizes(encoder.embed_dim, out_dim, encoder.grid, most_frames, num_prompt_tokens, joined)


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
            f"projector.{key} compares positions between frames, which encoder.tiling={tiling} splits into tiles; set "
            "encoder.tiling=1, or set projector.frame_stack=1, projector.temporal=none and another projector.reducer"
        )


def load_prompt_of(config: Config, folder: Path, **around: str) -> PromptEncoder:
    """Loads the tokenizer of the language model with the prompt.

    Args:
        config: Run configuration.
        folder: Folder of the language model.
        **around: Text directly before and after the visual tokens; see `load_prompt`.
    """
    from vlmcap.models.llm.prompt import load_prompt

    return load_prompt(folder, config.llm, **around)


def language_options(config: Config) -> dict[str, Any]:
    """Returns dtype, quantization, attention and device of a language model.

    Raises:
        UserError: The tuning trains weights that are quantised.
    """
    quantization = config.llm.quantization.value
    # Packed 4-bit and 8-bit weights have no gradient; adapters on them are trained in full precision.
    if quantization != "none" and any(stage.llm_lr > 0 for stage in config.tuning.stages.values()):
        raise UserError(
            f"tuning={config.tuning.name} trains the weights of the language model, which is not possible with "
            f"llm.quantization={quantization}; set llm.quantization=none"
        )
    return {
        "dtype": dtype_of(config.hardware.precision),
        "quantization": quantization,
        "attention": config.llm.attention,
        "device": device_of(config),
    }


def load_llm(config: Config, folder: Path, *, is_meta: bool = False) -> nn.Module:
    """Loads the frozen language model, or builds it on the meta device if `is_meta`."""
    from vlmcap.models.llm.load import build_meta_language_model, load_language_model

    if build := maker_of("llm", config.llm.kind):
        import torch

        # A plugin builds its model itself, so that the device context is the only way to keep it from allocating
        # memory.
        with torch.device("meta") if is_meta else contextlib.nullcontext():
            llm: nn.Module = build(config.llm, folder, **language_options(config))
        return llm.requires_grad_(False)
    # Meta weights are only placeholders for the shards of another process, which never are quantised.
    if is_meta:
        options = {name: value for name, value in language_options(config).items() if name != "quantization"}
        return build_meta_language_model(folder, **options)
    # FSDP2 moves the shard of each process to its GPU later; the full model may not fit there.
    return load_language_model(folder, is_on_host=config.trainer.strategy is Strategy.fsdp2, **language_options(config))


def load_vlm(config: Config, folder: Path, *, is_meta: bool = False) -> VlmComponents:
    """Loads the components of a pretrained VLM, frozen except for its projector.

    Args:
        config: Run configuration.
        folder: Folder of its base checkpoint.
        is_meta: Whether to build them on the meta device, without the layout that needs a tokenizer.
    """
    from vlmcap.models.encoders.tower import read_config
    from vlmcap.models.pretrained import build_pretrained, check_kind, load_pretrained

    check_kind(config.model.kind, folder)
    options: dict[str, Any] = {"max_patches": max_patches(config), "use_outer_marks": _uses_outer_marks(config)}
    if is_meta:
        return build_pretrained(read_config(folder), dtype=dtype_of(config.hardware.precision), **options)
    is_on_host = config.trainer.strategy is Strategy.fsdp2
    return load_pretrained(folder, is_on_host=is_on_host, **options, **language_options(config))


def _uses_outer_marks(config: Config) -> bool:
    return config.model.use_outer_marks if isinstance(config.model, TimedVlmConfig) else True


def loss_chunk_bytes(config: Config) -> int | None:
    """Returns the bytes of float32 logits that the loss computes at a time; None for all."""
    size_mib = config.hardware.loss_chunk_mib
    return None if size_mib is None else size_mib * 2**20


def add_adapters(config: Config, llm: nn.Module, num_kept: int = 0) -> nn.Module:
    """Prepares the language model for training: gradient checkpointing, and adapters or unfrozen weights.

    Args:
        config: Run configuration.
        llm: Language model, changed in place.
        num_kept: Number of layers that gradient checkpointing does not recompute.

    Returns:
        The language model, wrapped by peft if it has adapters.
    """
    from vlmcap.models.llm.adapt import add_lora
    from vlmcap.models.llm.layers import checkpoint_layers

    if config.hardware.gradient_checkpointing:
        checkpoint_layers(llm, is_offloaded=config.hardware.offload_checkpoints, num_kept=num_kept)
    # Full fine-tuning in any stage; the module freezes the weights again in stages that do not train them.
    if any(stage.llm_lr > 0 for stage in config.tuning.stages.values()):
        llm.float().requires_grad_(True)  # mixed precision needs float32 master weights
    if not config.tuning.use_lora:
        return llm
    adapted: nn.Module = add_lora(llm, lora_of(config))
    return adapted


def compile_blocks(config: Config, llm: nn.Module) -> None:
    """Compiles the blocks of the language model if `hardware.compile` is set; fake models are never compiled."""
    from vlmcap.models.llm.layers import compile_layers

    if config.hardware.compile:
        compile_layers(llm)
