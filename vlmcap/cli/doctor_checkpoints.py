"""What `vlmcap doctor llm.checkpoint=…` says: checkpoints as their small files describe them, without their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.libraries import import_libraries, silence_libraries
from vlmcap.terminal import grouped

PARTS = ("llm", "encoder", "model")


@dataclass(frozen=True, slots=True)
class Description:
    """One described checkpoint.

    Attributes:
        key: Key that names it, such as "llm.checkpoint".
        checkpoint: Its value.
        rows: Name and text of each line of the table.
        problems: One sentence for each thing that keeps a run from using it as it is.
        plain: Plain data for JSON.
    """

    key: str
    checkpoint: str
    rows: Sequence[tuple[str, str]]
    problems: Sequence[str]
    plain: dict[str, Any]

    @property
    def verdict(self) -> str:
        """Whether a run can use the checkpoint, and what it needs if it cannot."""
        if self.problems:
            return f"Not ready: {'; '.join(self.problems)}."
        return f"Ready: {self.key}={self.checkpoint} can be used as it is."


def described_parts(overrides: Sequence[str]) -> list[str]:
    """The parts whose checkpoints are named in overrides, in the order llm, encoder, model."""
    keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    return [part for part in PARTS if f"{part}.checkpoint" in keys]


def describe_and_show(config: Config, parts: Sequence[str], *, as_json: bool) -> None:
    """Prints the descriptions, and exits with 1 where a checkpoint cannot be used.

    Args:
        config: Run configuration that names the checkpoints.
        parts: Parts to describe, of `PARTS`.
        as_json: Print JSON in place of tables.

    Raises:
        UserError: A checkpoint is not there, or is of another kind.
        SystemExit: With code 1 where something keeps a run from using one.
    """
    import_libraries(with_adapters=False, with_training=False)
    silence_libraries()
    found = [_describe_encoder(config) if part == "encoder" else _describe_language(config, part) for part in parts]
    if as_json:
        print(
            json.dumps({one.key: one.plain | {"verdict": one.verdict} for one in found}, ensure_ascii=False, indent=2)
        )
    else:
        for one in found:
            _show(one)
    if any(one.problems for one in found):
        raise SystemExit(1)


def _folder(config: Config, part: str) -> Path:
    from vlmcap.models.checkpoint import locate

    settings = getattr(config, part)
    return locate(
        settings.checkpoint, settings.revision, key=f"{part}.checkpoint", gate=settings.gate, has_weights=False
    )


def _describe_language(config: Config, part: str) -> Description:
    """A language model, or the language model of a whole model."""
    from vlmcap.models.llm.inspection import LlmDescription, describe_llm

    settings = getattr(config, part)
    found: LlmDescription = describe_llm(_folder(config, part), chat_template=settings.chat_template)
    template = "of the checkpoint" if found.has_chat_template else "none"
    ids = "no tokenizer" if found.largest_id is None else f"largest token id {grouped(found.largest_id)}"
    engine = (
        "vlmcap's own"
        if found.is_native
        else "transformers' generate, as our own engine does not decode this class or its settings"
    )
    packages = ", ".join(found.optional_packages) or "none"
    if found.missing_packages:
        packages += f"; not installed here, so it runs slower: pip install {' '.join(found.missing_packages)}"
    rows = (
        ("class", f"{found.model_class} ({found.model_type}){', part of a whole model' if found.is_part else ''}"),
        ("context", "no limit" if found.context is None else f"{grouped(found.context)} tokens"),
        ("size", f"width {grouped(found.hidden_size)}, {found.num_layers} layers"),
        ("vocabulary", f"{grouped(found.vocab_size)} rows of the embedding, {ids}"),
        ("chat template", "llm.chat_template" if settings.chat_template else template),
        ("end tokens", " ".join(found.end_tokens) or "unknown"),
        (
            "thinking",
            "llm.enable_thinking turns it on and off"
            if found.has_thinking_switch
            else "the template has no switch for it",
        ),
        ("license", found.license or "unknown"),
        ("attention", ", ".join(found.attention)),
        ("sliding window", "none" if found.sliding_window is None else f"{grouped(found.sliding_window)} tokens"),
        (
            "packed batches",
            "data.batching=packed works" if found.is_packable else "not known to work; data.batching=by_length does",
        ),
        ("captions", engine),
        ("optional packages", packages),
    )
    return Description(f"{part}.checkpoint", settings.checkpoint, rows, found.problems, found.plain())


def _describe_encoder(config: Config) -> Description:
    """A vision encoder, as far as its configuration says."""
    from vlmcap.models.encoders.tower import read_config

    folder = _folder(config, "encoder")
    whole = read_config(folder)
    vision = whole.get("vision_config") or whole
    width, patch, side = (vision.get(name) for name in ("hidden_size", "patch_size", "image_size"))
    if width is None or patch is None:
        raise UserError(
            f"encoder.checkpoint {folder} holds no vision encoder but a {whole.get('model_type')}; take another "
            "checkpoint"
        )
    is_square = isinstance(patch, int) and isinstance(side, int)
    plain = {
        "model_class": ", ".join(whole.get("architectures") or ()) or None,
        "model_type": vision.get("model_type") or whole.get("model_type"),
        "image_size": side,
        "patch_size": patch,
        "grid": [side // patch] * 2 if is_square else None,
        "width": width,
        "num_layers": vision.get("num_hidden_layers"),
    }
    texts = {name: "unknown" if value is None else str(value) for name, value in plain.items()}
    if is_square:
        texts["grid"] = f"{side // patch} × {side // patch} patches per frame"
    names = {
        "model_class": "class",
        "model_type": "type",
        "image_size": "image size",
        "patch_size": "patch",
        "num_layers": "layers",
    }
    rows = tuple((names.get(name, name), text) for name, text in texts.items())
    return Description("encoder.checkpoint", config.encoder.checkpoint, rows, (), plain)


def _show(found: Description) -> None:
    console = Console(highlight=False)
    table = Table(
        box=None, show_header=False, pad_edge=False, title=f"{found.key}={found.checkpoint}", title_justify="left"
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in found.rows:
        table.add_row(name, text.replace("[", "\\["))
    console.print(table)
    console.print(found.verdict, style="bold red" if found.problems else "green", markup=False, soft_wrap=True)
