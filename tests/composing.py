"""Configurations of tests: Hydra composes each choice of files one time, and single values are set in a copy of it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from vlmcap.overrides import read_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

_VALUE = re.compile(r"(?!hydra\.)(\w+(\.\w+)+|seed|monitor|mode|checkpoint)=.*")  # chooses no file
_PART = re.compile(r"(model|encoder|llm)\.")
_CHECKPOINT = re.compile(r"(model|encoder|llm)\.checkpoint=")


class Remembered:
    """`compose_node` with a memory.

    Hydra itself puts values in after the files are merged, so the result is the same. Where anything goes wrong, all is
    composed as written, so that errors are the true ones.

    Args:
        compose_node: The function that composes.
    """

    def __init__(self, compose_node: Callable[..., DictConfig]) -> None:
        self._compose_node = compose_node
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str], *, name: str = "train") -> DictConfig:
        from vlmcap.config_files import CONFIG_DIR_VARIABLE

        if CONFIG_DIR_VARIABLE in os.environ:  # files that a test may still change
            return self._compose_node(overrides, name=name)
        try:
            return self._from_memory(overrides, name)
        except Exception:
            return self._compose_node(overrides, name=name)

    def _from_memory(self, overrides: Sequence[str], name: str) -> DictConfig:
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from omegaconf import OmegaConf

        # Another checkpoint than that of a file changes other values of its group, unless they were typed as well.
        is_renamed = any(_CHECKPOINT.match(override) for override in overrides)
        values = [one for one in overrides if _VALUE.fullmatch(one) and not (is_renamed and _PART.match(one))]
        files = [one for one in overrides if one not in values]
        key = (name, *files)
        if key not in self._composed:
            self._composed[key] = self._compose_node(files, name=name)
        node = copy.deepcopy(self._composed[key])
        OmegaConf.set_struct(node, True)
        ConfigLoaderImpl._apply_overrides_to_config([_parsed(value) for value in values], node)
        OmegaConf.set_struct(node, False)
        return node


@cache
def _parsed(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (text,) = read_overrides([override])
    return OverridesParser.create().parse_override(text)
