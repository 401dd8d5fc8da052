"""The model of a configuration in one call, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmcap.assembly.model import Assembly
    from vlmcap.config import Config
    from vlmcap.types import Clip


def assembled(config: Config, clips: Mapping[str, Sequence[Clip]] | None = None) -> Assembly:
    """Describes, prepares features where there are clips, and loads, as a run does."""
    from vlmcap.assembly.features import prepare_features
    from vlmcap.assembly.model import assemble, describe_model

    spec = describe_model(config)
    return assemble(spec, None if clips is None else prepare_features(spec.feature_plan, clips))
