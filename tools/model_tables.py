"""Markdown tables of the encoders, projectors, language models, pretrained VLMs and GPUs in `conf/`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vlmcap.config import EncoderConfig, HardwareConfig, LlmConfig, PretrainedVlmConfig, ProjectorConfig
from vlmcap.models.encoders import VisionEncoder
from vlmcap.models.known import known_model_config
from vlmcap.models.pretrained import build_pretrained
from vlmcap.models.projectors import ProjectorSizes, build_projector, count_tokens
from vlmcap.terminal import grouped

Row = Sequence[str]
NONE = "–"
PARITY_HEADER = ("status", "parity test", "error")


@dataclass(frozen=True, slots=True)
class Parity:
    """Comparison with the reference implementation.

    Attributes:
        test: Test that compares, as `path::name`.
        error: Largest absolute difference measured by the test.
    """

    test: str
    error: float


def read_parity(file: Path) -> dict[str, Parity]:
    """Reads the comparisons by key, such as `encoder:clip` or `llm:qwen3`; returns none if the file is missing."""
    if not file.is_file():
        return {}
    return {key: Parity(**value) for key, value in json.loads(file.read_text(encoding="utf-8")).items()}


def page_parser(tool: str, description: str, *, measured: str = "") -> argparse.ArgumentParser:
    """Returns the parser of a tool that writes generated pages.

    Args:
        tool: Name of the module in `tools`.
        description: What the tool does.
        measured: Help of `--measured`, a file with results of tests; empty leaves the option out.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tools.{tool}", description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if a page is outdated")
    if measured:
        parser.add_argument("--measured", type=Path, metavar="FILE", help=measured)
    return parser


def write_or_check(path: Path, text: str, tool: str, *, is_check: bool) -> int:
    """Writes a generated page, or checks that it is current; returns the exit code.

    Args:
        path: A file under `docs/reference/`.
        text: What the page should be.
        tool: Name of the module in `tools` that makes the page.
        is_check: Whether to write nothing and return 1 if the page is outdated.
    """
    if not is_check:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        print(f"docs/reference/{path.name} is outdated; run python -m tools.{tool}", file=sys.stderr)
        return 1
    return 0


def markdown_table(header: Row, rows: Iterable[Row]) -> str:
    """Returns a table; cells are Markdown, and a `|` in them is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


ENCODER_HEADER = (
    "name",
    "checkpoint",
    "class",
    "parameters",
    "width",
    "visual tokens per frame",
    "license",
    *PARITY_HEADER,
)


def encoder_row(config: EncoderConfig, encoder: VisionEncoder, parity: Mapping[str, Parity]) -> Row:
    """Returns the row of an encoder.

    Args:
        config: Settings of the encoder.
        encoder: Encoder built from the settings, with or without weights.
        parity: All comparisons with reference implementations.
    """
    known = known_model_config(config.checkpoint)
    vision = getattr(known, "vision_config", known)
    tower = _meta_model("AutoModel", vision)
    num_joined = getattr(encoder, "frames_per_token", 1)
    up_to = "at most " if len(encoder.possible_grids(num_joined)) > 1 else ""
    joined = f" per {num_joined} frames" if num_joined > 1 else ""
    return (
        f"`{config.name}`",
        _link(config.checkpoint),
        f"`{type(tower).__name__}`",
        _millions(tower),
        str(encoder.embed_dim),
        f"{up_to}{encoder.num_patches}{joined}",
        _license(config.license, config.gate),
        *parity_cells(parity, f"encoder:{vision.model_type}"),
    )


PROJECTOR_HEADER = ("name", "parameters, 1 024 → 4 096", "tokens for 8 frames of 24 × 24 patches", *PARITY_HEADER)


def projector_row(config: ProjectorConfig, sizes: ProjectorSizes, parity: Mapping[str, Parity]) -> Row:
    """Returns the row of a projector.

    Args:
        config: Settings of the projector.
        sizes: Sizes of the example: widths 1 024 and 4 096, 8 frames of 24 × 24 patches.
        parity: All comparisons with reference implementations.
    """
    with torch.device("meta"):
        projector = build_projector(config, sizes)
    tokens = grouped(count_tokens(config, sizes, sizes.num_frames))
    return (f"`{config.name}`", _millions(projector), tokens, *parity_cells(parity, f"projector:{config.kind}"))


LLM_HEADER = ("name", "checkpoint", "class", "parameters", "width", "layers", "context", "license", *PARITY_HEADER)


def llm_row(config: LlmConfig, parity: Mapping[str, Parity]) -> Row:
    """Returns the row of a language model."""
    known = known_model_config(config.checkpoint)
    model = _meta_model("AutoModelForCausalLM", known)
    return (
        f"`{config.name}`",
        _link(config.checkpoint),
        f"`{type(model).__name__}`",
        _millions(model),
        str(known.hidden_size),
        str(known.num_hidden_layers),
        grouped(known.max_position_embeddings),
        _license(config.license, config.gate),
        *parity_cells(parity, f"llm:{known.model_type}"),
    )


MODEL_HEADER = ("name", "checkpoint", "class", "parameters", "visual tokens", "license", *PARITY_HEADER)


def model_row(config: PretrainedVlmConfig, parity: Mapping[str, Parity]) -> Row:
    """Returns the row of a pretrained VLM."""
    known = known_model_config(config.checkpoint)
    model = _meta_model("AutoModelForImageTextToText", known)
    return (
        f"`{config.name}`",
        _link(config.checkpoint),
        f"`{type(model).__name__}`",
        _millions(model),
        _vlm_tokens(known),
        _license(config.license, config.gate),
        *parity_cells(parity, f"model:{known.model_type}"),
    )


HARDWARE_HEADER = (
    "name",
    "GiB",
    "precision",
    "weights",
    "attention",
    "clips per step",
    "frames",
    "image size",
    "checkpointing",
)


def hardware_row(config: HardwareConfig) -> Row:
    """Returns the row of a hardware profile."""
    return (
        f"`{config.name}`",
        f"{config.memory_gib:g}",
        config.precision.name,
        config.quantization.name,
        config.attention,
        f"{config.batch_size} × {config.accumulate_grad_batches}",
        str(config.num_frames),
        "the encoder's" if config.image_size is None else str(config.image_size),
        "yes" if config.gradient_checkpointing else "no",
    )


def _meta_model(auto_class: str, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, auto_class).from_config(config)
    return model


def _vlm_tokens(config: Any) -> str:
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        side = vision.patch_size * vision.spatial_merge_size
        return f"1 per {side} × {side} pixels of {vision.temporal_patch_size} frames"
    parts = build_pretrained(config.to_dict(), dtype=torch.bfloat16, max_patches=1)
    return f"{parts.num_tokens(1, parts.encoder.grid)} per frame"


def parity_cells(parity: Mapping[str, Parity], key: str) -> Row:
    """Returns the cells under `PARITY_HEADER` of a comparison."""
    if found := parity.get(key):
        return "tested at tiny size", f"`{found.test}`", f"{found.error:.0e}".replace("e-0", "e-")
    return "property tests" if key.startswith("projector:") else "not compared yet", NONE, NONE


def _license(license: str, gate: str | None) -> str:
    name = license or gate or NONE
    return f"{name}; gated: accept it on the checkpoint's page" if gate else name


def _link(checkpoint: str) -> str:
    return f"[{checkpoint}](https://huggingface.co/{checkpoint})"


def _millions(module: nn.Module) -> str:
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return f"{millions:.1f} M" if millions < 1000 else f"{grouped(round(millions))} M"
