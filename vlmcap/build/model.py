"""Encoder, projector and language model of a configuration, assembled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcap.config import Config, Precision
from vlmcap.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vlmcap.models.captioner import VideoCaptioner
    from vlmcap.models.checkpoint import Fingerprint
    from vlmcap.models.encoders import FrameTransform, VisionEncoder
    from vlmcap.models.llm.prompt import PromptEncoder


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the frozen bases are, and what they hold."""

    encoder: Path
    llm: Path
    bases: dict[str, Fingerprint]


@dataclass(frozen=True, slots=True)
class Assembly:
    """A model and what data needs to know of it."""

    captioner: VideoCaptioner
    sources: Sources
    transform: FrameTransform
    num_visual_tokens: int
    num_encoder_parameters: int


def dtype_of(precision: Precision) -> torch.dtype:
    """Type of frozen weights and of arithmetic on them."""
    import torch

    return {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}[precision]


def device_of(config: Config) -> str:
    """Device of quantised weights while loading."""
    import torch

    if config.hardware.accelerator == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(f"hardware={config.hardware.name} needs a CUDA device and there is none; use hardware=cpu, or check the driver")
    return f"cuda:{torch.cuda.current_device()}"


def locate_sources(config: Config) -> Sources:
    """Finds both bases and takes their fingerprints.

    Raises:
        UserError: A checkpoint is not there.
    """
    from vlmcap.models.checkpoint import fingerprint, locate

    memo = Path(config.paths.cache_dir) / "fingerprints.json"
    folders: dict[str, Path] = {}
    bases: dict[str, Fingerprint] = {}
    for part, settings in (("encoder", config.encoder), ("llm", config.llm)):
        folders[part] = locate(settings.checkpoint, settings.revision, key=f"{part}.checkpoint", gate=settings.gate)
        bases[part] = fingerprint(folders[part], settings.checkpoint, memo)
    return Sources(folders["encoder"], folders["llm"], bases)


def assemble(config: Config) -> Assembly:
    """The model of a configuration, its trained parts fresh.

    Args:
        config: As `prepare` returned it.

    Raises:
        UserError: A part is missing or the parts do not fit.
    """
    from vlmcap.models.captioner import GenerationSettings, VideoCaptioner
    from vlmcap.models.llm.load import context_length
    from vlmcap.models.llm.prompt import load_prompt
    from vlmcap.models.projectors import build_projector

    sources = locate_sources(config)
    encoder, llm_config = load_encoder(config, sources), config.llm
    if config.data.num_frames % config.projector.frame_stack:
        raise UserError(
            f"projector.frame_stack={config.projector.frame_stack} does not divide data.num_frames={config.data.num_frames}; "
            "set one to a divisor of the other"
        )
    prompt = load_prompt(
        sources.llm, prompt=llm_config.prompt, system_prompt=llm_config.system_prompt, enable_thinking=llm_config.enable_thinking
    )
    out_dim, context = text_width(sources.llm), context_length(sources.llm)
    if config.projector.temporal.value == "attention" and out_dim % config.projector.num_heads:
        raise UserError(f"projector.num_heads={config.projector.num_heads} does not divide the width {out_dim} of llm={llm_config.name}")
    projector = build_projector(
        config.projector.kind.value,
        in_dim=encoder.embed_dim,
        out_dim=out_dim,
        grid=encoder.grid,
        num_frames=config.data.num_frames,
        depth=config.projector.depth,
        pool_size=config.projector.pool_size if config.projector.reducer.value == "pool" else 1,
        frame_stack=config.projector.frame_stack,
        temporal=config.projector.temporal.value,
        num_heads=config.projector.num_heads,
    )
    num_visual = projector.num_tokens(config.data.num_frames, encoder.num_patches)
    check_context(config, num_visual, prompt, context)
    captioner = VideoCaptioner(
        encoder,
        projector,
        load_llm(config, sources),
        prompt,
        GenerationSettings(llm_config.max_new_tokens, config.evaluation.num_beams, config.evaluation.repetition_penalty),
    )
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return Assembly(captioner, sources, encoder.transform, num_visual, num_parameters)


def text_width(folder: Path) -> int:
    """Dl, from the configuration alone."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().hidden_size)


def load_encoder(config: Config, sources: Sources) -> VisionEncoder:
    """The frozen vision encoder."""
    from vlmcap.models.encoders import LOADERS

    load = LOADERS[config.encoder.family.value]
    encoder = load(sources.encoder, feature_layer=config.encoder.feature_layer, dtype=dtype_of(config.hardware.precision))
    encoder.requires_grad_(False).eval()
    return encoder


def load_llm(config: Config, sources: Sources) -> nn.Module:
    """The language model, frozen, with adapters, or thawed, as tuning says."""
    from vlmcap.models.llm.adapt import add_lora
    from vlmcap.models.llm.load import load_language_model

    quantization, stages = config.llm.quantization.value, config.tuning.stages.values()
    if quantization != "none" and any(stage.llm_lr > 0 for stage in stages):
        raise UserError(
            f"tuning={config.tuning.name} trains the language model's own weights, which llm.quantization={quantization} forbids; "
            "set llm.quantization=none"
        )
    llm = load_language_model(
        sources.llm,
        dtype=dtype_of(config.hardware.precision),
        quantization=quantization,
        attention=config.llm.attention,
        device=device_of(config),
    )
    if config.hardware.gradient_checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if any(stage.llm_lr > 0 for stage in stages):
        llm.float().requires_grad_(True)  # mixed precision wants float32 masters
    lora = config.tuning.lora
    if not config.tuning.use_lora:
        return llm
    adapted: nn.Module = add_lora(llm, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules)
    return adapted


def check_context(config: Config, num_visual_tokens: int, prompt: PromptEncoder, context: int) -> None:
    """`UserError` if visual tokens, prompt and the longest caption do not fit the language model's positions together."""
    text = prompt.num_prompt_tokens
    longest = max(config.llm.max_caption_tokens, config.llm.max_new_tokens)
    if num_visual_tokens + text + longest > context:
        raise UserError(
            f"{num_visual_tokens} visual tokens, {text} of the prompt and {longest} of the caption exceed the context of {context} tokens "
            f"of llm={config.llm.name}; lower data.num_frames, set projector.reducer=pool, "
            "or lower llm.max_caption_tokens and llm.max_new_tokens"
        )
