"""Plugin files for tests, and registries as they were before."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore

from vlmcap import compose, plugins
from vlmcap.config.kinds import MAKERS, SCHEMAS
from vlmcap.plugins import is_foreign

_LIBRARIES = (Path(__file__).parents[1], sys.prefix, sys.base_prefix)  # what is imported from there stays

GATED = """
from dataclasses import dataclass
import torch.nn.functional as F
from torch import nn
from vlmcap.config import TokenProjectorConfig
from vlmcap.config.kinds import register_component
from vlmcap.models.projectors import Projection

@dataclass
class GatedConfig(TokenProjectorConfig):
    kind: str = "gated"
    expansion: int = 2

@register_component("projector", GatedConfig)
class GatedProjector(Projection[GatedConfig]):
    reads = "token"

    def __init__(self, config, sizes):
        super().__init__()
        inner = sizes.out_dim * config.expansion
        self.gate, self.up = nn.Linear(sizes.in_dim, inner), nn.Linear(sizes.in_dim, inner)
        self.down = nn.Linear(inner, sizes.out_dim)

    def forward(self, tokens, layout):
        return self.down(F.silu(self.gate(tokens)) * self.up(tokens))
"""


def _is_added(part: Any) -> bool:
    """Whether a test registered it: it is a plugin's, or an example's, which its module does not hold."""
    return is_foreign(part) or not hasattr(sys.modules[part.__module__], part.__qualname__)


@contextmanager
def own_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, parts may be registered and modules imported; nothing of it is left afterwards."""
    before = {(group, kind) for registry in (SCHEMAS, MAKERS) for group, kinds in registry.items() for kind in kinds}
    modules, path = set(sys.modules), list(sys.path)
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "")  # put back afterwards, whatever a test makes of it
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(compose, "register_schemas", inspect.unwrap(compose.register_schemas))
    monkeypatch.setattr(
        compose, "compose_node", getattr(compose.compose_node, "_compose_node", compose.compose_node)
    )  # without memory
    plugins._installed.cache_clear()
    plugins._origin.cache_clear()
    try:
        yield
    finally:
        for registry in (SCHEMAS, MAKERS):
            for group, kinds in registry.items():
                for kind in [kind for kind, part in kinds.items() if (group, kind) not in before and _is_added(part)]:
                    del kinds[kind]
                    for name in (kind, f"{kind}_schema"):
                        ConfigStore.instance().repo.get(group, {}).pop(f"{name}.yaml", None)
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and not any(Path(file).is_relative_to(folder) for folder in _LIBRARIES):
                del sys.modules[name]
        sys.path[:] = path
        plugins._installed.cache_clear()
        plugins._origin.cache_clear()


def plugin_file(folder: Path, name: str, source: str) -> str:
    """A plugin's file."""
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    return str(file)
