"""Projector configurations by kind, with the steps around the projection disabled by default."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from vlmcap.config import ProjectorConfig, Queries, Reducer, Temporal
from vlmcap.config.kinds import schema_of

_CHOICES = {"reducer": Reducer, "temporal": Temporal, "queries": Queries}
SHARED = ("num_heads", "num_queries", "num_layers", "resample_size", "window", "num_global")


def settings_of(kind: str, **values: Any) -> ProjectorConfig:
    """Builds the dataclass of a kind; sizes that many kinds share may be given to all, other keys must exist."""
    schema = schema_of("projector", kind)
    known = {field.name for field in dataclasses.fields(schema)}
    values = {"reducer": "none", "temporal": "none"} | {
        name: value for name, value in values.items() if name in known or name not in SHARED
    }
    chosen = {name: _CHOICES[name](value) if name in _CHOICES else value for name, value in values.items()}
    return cast(ProjectorConfig, schema(**chosen))
