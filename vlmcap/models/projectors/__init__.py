"""Projectors: features of the vision encoder to tokens of the language model.

Legend: B batch, F frames, P patches a frame, Dv vision width, V visual tokens a clip, Dl language width.
"""

from vlmcap.models.projectors.projector import Projector, build_projector
from vlmcap.models.projectors.spec import ProjectorSpec
from vlmcap.models.projectors.warm_start import load_projector_weights

__all__ = ["Projector", "ProjectorSpec", "build_projector", "load_projector_weights"]
