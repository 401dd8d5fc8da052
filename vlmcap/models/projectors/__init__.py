"""Projectors: features of the vision encoder to tokens of the language model.

Legend: B batch, F frames, P patches a frame, Dv vision width, V visual tokens a clip, Dl language width.
"""

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
