"""Projectors, which map features of the vision encoder to tokens of the language model."""

from vlmcap.models.projectors.base import Projection, ProjectorSizes, TokenLayout
from vlmcap.models.projectors.projector import Projector, build_projector, check_projector, count_tokens
from vlmcap.models.projectors.warm_start import load_projector_weights

__all__ = [
    "Projection",
    "Projector",
    "ProjectorSizes",
    "TokenLayout",
    "build_projector",
    "check_projector",
    "count_tokens",
    "load_projector_weights",
]
