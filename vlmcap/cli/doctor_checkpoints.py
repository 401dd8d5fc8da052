"""`vlmcap doctor llm.checkpoint=…`: describes checkpoints from their configuration files, without their weights."""

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

GROUPS = ("llm", "encoder", "model")


@dataclass(frozen=True, slots=True)
class Description:
    """One described checkpoint.

    Attributes:
        key: Key that names it, such as "llm.checkpoint".
        checkpoint: Value of the key.
        rows: Name and text of each line of the table.
        problems: One sentence for each problem that keeps a run from using the checkpoint.
        plain: Plain data for JSON.
    """

    key: str
    checkpoint: str
    rows: Sequence[tuple[str, str]]
    problems: Sequence[str]
    plain: dict[str, Any]

    @property
    def verdict(self) -> str:
        """One sentence that says whether a run can use the checkpoint, and what it needs if it cannot."""
        if self.problems:
            return f"Not ready: {'; '.join(self.problems)}."
        return f"Ready: {self.key}={self.checkpoint} can be used as it is."


def described_groups(overrides: Sequence[str]) -> list[str]:
    """Returns the groups whose checkpoints are named in overrides, in the order of `GROUPS`."""
    keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    return [group for group in GROUPS if f"{group}.checkpoint" in keys]


def describe_and_show(config: Config, groups: Sequence[str], *, as_json: bool) -> None:
    """Prints the descriptions of checkpoints.

    Args:
        config: Run configuration that names the checkpoints.
        groups: Names from `GROUPS`.
        as_json: Whether to print JSON instead of tables.

    Raises:
        UserError: A checkpoint does not exist, or is of another kind.
        SystemExit: With code 1 if a run cannot use one of the checkpoints.
    """
    import_libraries(with_adapters=False, with_training=False)
    silence_libraries()
    each = [_describe_encoder(config) if group == "encoder" else _describe_llm(config, group) for group in groups]
    if as_json:
        print(json.dumps({one.key: one.plain | {"verdict": one.verdict} for one in each}, ensure_ascii=False, indent=2))
    else:
        for one in each:
            _show(one)
    if any(one.problems for one in each):
        raise SystemExit(1)


def _folder(config: Config, group: str) -> Path:
    from vlmcap.models.checkpoint import locate

    settings = getattr(config, group)
    return locate(
        settings.checkpoint, settings.revision, key=f"{group}.checkpoint", gate=settings.gate, has_weights=False
    )


def _describe_llm(config: Config, group: str) -> Description:
    """Describes a language model, or the language model of a pretrained VLM."""
    from vlmcap.models.llm.inspection import LlmDescription, describe_llm

    settings = getattr(config, group)
    llm: LlmDescription = describe_llm(_folder(config, group), chat_template=settings.chat_template)
    # What the checkpoint has, as text for the table.
    template = "from the checkpoint" if llm.has_chat_template else "none"
    ids = "no tokenizer" if llm.largest_id is None else f"largest token id {grouped(llm.largest_id)}"
    engine = "native" if llm.is_native else "transformers' generate; the native engine does not support this model"
    packages = ", ".join(llm.optional_packages) or "none"
    if llm.missing_packages:
        packages += f"; without these it runs slower: pip install {' '.join(llm.missing_packages)}"
    rows = (
        ("class", f"{llm.model_class} ({llm.model_type}){', in a pretrained VLM' if llm.is_part else ''}"),
        ("context", "no limit" if llm.context is None else f"{grouped(llm.context)} tokens"),
        ("size", f"width {grouped(llm.hidden_size)}, {llm.num_layers} layers"),
        ("vocabulary", f"{grouped(llm.vocab_size)} embeddings, {ids}"),
        ("chat template", "llm.chat_template" if settings.chat_template else template),
        ("end tokens", " ".join(llm.end_tokens) or "unknown"),
        (
            "thinking",
            "llm.enable_thinking turns it on and off"
            if llm.has_thinking_switch
            else "the chat template cannot turn it on or off",
        ),
        ("license", llm.license or "unknown"),
        ("attention", ", ".join(llm.attention)),
        ("sliding window", "none" if llm.sliding_window is None else f"{grouped(llm.sliding_window)} tokens"),
        (
            "packed batches",
            "data.batching=packed works" if llm.is_packable else "not known to work; use data.batching=by_length",
        ),
        ("decoding engine", engine),
        ("optional packages", packages),
    )
    return Description(f"{group}.checkpoint", settings.checkpoint, rows, llm.problems, llm.plain())


def _describe_encoder(config: Config) -> Description:
    """Describes a vision encoder from its configuration file."""
    from vlmcap.models.encoders.tower import read_config

    folder = _folder(config, "encoder")
    content = read_config(folder)
    # Encoders with a text tower, such as CLIP, have the vision encoder in a section.
    vision = content.get("vision_config") or content
    width, patch, side = (vision.get(name) for name in ("hidden_size", "patch_size", "image_size"))
    if width is None or patch is None:
        raise UserError(
            f"encoder.checkpoint {folder} is a {content.get('model_type')} and has no vision encoder; choose another "
            "checkpoint"
        )
    # Some encoders state patch or image size as a list, or no image size at all.
    is_square = isinstance(patch, int) and isinstance(side, int)
    plain = {
        "model_class": ", ".join(content.get("architectures") or ()) or None,
        "model_type": vision.get("model_type") or content.get("model_type"),
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


def _show(one: Description) -> None:
    console = Console(highlight=False)
    table = Table(
        box=None, show_header=False, pad_edge=False, title=f"{one.key}={one.checkpoint}", title_justify="left"
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in one.rows:
        table.add_row(name, text.replace("[", "\\["))
    console.print(table)
    console.print(one.verdict, style="bold red" if one.problems else "green", markup=False, soft_wrap=True)
