"""The configurations of a table of encoders, language models and hardware, composed in fewer steps than it has cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmcap.compose import compose_node, config_dir, to_config
from vlmcap.config import Config
from vlmcap.demo.prepare import TINY_ENCODERS
from vlmcap.errors import UserError

_GROUPS = ("hardware", "encoder", "llm")
_LEFT_OUT = {"hardware": {"cpu"}, "encoder": {"own", *TINY_ENCODERS}, "llm": {"own", "tiny"}}
_FOLLOWS = {"encoder": ("encoder", "cache"), "llm": ("llm", "projector", "tuning")}  # groups whose values come from these groups


@dataclass(frozen=True, slots=True)
class GridNames:
    """What is combined.

    Attributes:
        hardware: Profiles.
        encoder: Rows.
        llm: Columns.
        rest: Overrides that all share.
    """

    hardware: Sequence[str]
    encoder: Sequence[str]
    llm: Sequence[str]
    rest: Sequence[str] = field(default_factory=tuple)


def grid_names(overrides: Sequence[str]) -> GridNames:
    """The names of a command line, `hardware=l4,t4` several and all that `conf/` has where a group is not named.

    Raises:
        UserError: A whole model is asked for, which leaves nothing to combine.
    """
    chosen: dict[str, list[str]] = {}
    rest = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "model" and value != "assembled":
            raise UserError(f"--grid combines encoders and language models, and {override} has its own; leave one of them out")
        if key in _GROUPS:
            chosen.setdefault(key, []).extend(value.split(","))
        else:
            rest.append(override)
    return GridNames(**{group: chosen.get(group) or _all_names(group) for group in _GROUPS}, rest=rest)


def _all_names(group: str) -> list[str]:
    """Of conf/, the smallest card first."""
    if group == "hardware":
        return sorted(_files(group), key=lambda name: (_memory(name), name))
    return _files(group)


def _memory(hardware: str) -> float:
    from omegaconf import OmegaConf

    return float(OmegaConf.load(Path(config_dir()) / "hardware" / f"{hardware}.yaml").memory_gib)


def _files(group: str) -> list[str]:
    return sorted(file.stem for file in (Path(config_dir()) / group).glob("*.yaml") if file.stem not in _LEFT_OUT[group])


class GridConfigs:
    """Configurations of cells: Hydra composes each name once, and what comes from a name is exchanged in the rest.

    Args:
        names: Of the table.

    Raises:
        UserError: An override is wrong.
    """

    def __init__(self, names: GridNames) -> None:
        from omegaconf import OmegaConf

        first = {group: getattr(names, group)[0] for group in _GROUPS}
        composed = {(group, name): self._compose(names, first | {group: name}) for group in _GROUPS for name in getattr(names, group)}
        self._bases: dict[str, Config] = {}
        self._parts: dict[tuple[str, str, str], dict[str, Any]] = {}
        for hardware in names.hardware:
            node = composed["hardware", hardware]
            self._bases[hardware] = to_config(node)
            for group, follows in _FOLLOWS.items():
                for name in getattr(names, group):
                    exchanged = node.copy()
                    exchanged[group] = composed[group, name]._get_node(group)
                    self._parts[hardware, group, name] = {part: OmegaConf.to_object(exchanged[part]) for part in follows}

    @staticmethod
    def _compose(names: GridNames, chosen: dict[str, str]) -> Any:
        return compose_node([*names.rest, *(f"{group}={name}" for group, name in chosen.items())])

    def config(self, hardware: str, encoder: str, llm: str) -> Config:
        """Of a cell.

        Raises:
            UserError: The names do not go together.
        """
        parts = self._parts[hardware, "encoder", encoder] | self._parts[hardware, "llm", llm]
        try:
            return dataclasses.replace(self._bases[hardware], **parts)
        except ValueError as error:
            raise UserError(str(error)) from error


def cells(names: GridNames) -> Iterator[tuple[str, str, str]]:
    """Hardware, encoder and language model of every cell."""
    return ((hardware, encoder, llm) for hardware in names.hardware for encoder in names.encoder for llm in names.llm)
