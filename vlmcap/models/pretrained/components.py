"""The components of a pretrained VLM, and how its checkpoint is read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlmcap.errors import UserError, first_line
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.types import VisualLayout


@dataclass(frozen=True, slots=True)
class VlmComponents:
    """The encoder, projector and language model of a pretrained VLM, which together hold each used weight once.

    Attributes:
        encoder: Frozen vision tower, with the interface of `VisionEncoder`.
        projector: Projector or patch merger, in float32.
        llm: Frozen language model with its head.
        num_tokens: Picklable function (F, (h, w)) -> V, with F in temporal patches if the encoder joins frames.
        captioner_class: Constructor of the captioner from (encoder, projector, llm, prompt, generation).
        visual_prefix: Text directly before the visual tokens.
        visual_suffix: Text directly after the visual tokens.
        visual_layout: Picklable map from a clip's size and times to runs of placeholders and the text between them;
            None for a single run.
    """

    encoder: Any
    projector: Any
    llm: nn.Module
    num_tokens: Callable[[int, tuple[int, int]], int]
    captioner_class: Callable[..., VideoCaptioner] = VideoCaptioner
    visual_prefix: str = ""
    visual_suffix: str = ""
    visual_layout: VisualLayout | None = None


@contextmanager
def reading(kind: str, folder: Path) -> Iterator[None]:
    """Converts the exceptions of reading a checkpoint to an error for the user.

    Raises:
        UserError: The folder cannot be loaded as a model of that kind.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        ImportError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"model.checkpoint {folder} could not be loaded as {kind}: {first_line(error)}") from error


def read_model(model_class: Any, kind: str, folder: Path, **options: Any) -> Any:
    """Loads a model with the weights in `folder`.

    Code in the checkpoint is never run, and pickled weights may contain only tensors.

    Args:
        model_class: Class of transformers.
        kind: As for `load_pretrained`, for the error message.
        folder: Checkpoint in Hugging Face layout.
        **options: Further arguments of `from_pretrained`.

    Raises:
        UserError: The folder cannot be loaded, or the model is incomplete.
    """
    with reading(kind, folder):
        model, loading = model_class.from_pretrained(
            folder, trust_remote_code=False, weights_only=True, output_loading_info=True, **options
        )
    if missing := sorted(loading["missing_keys"]):  # transformers initialises them randomly
        raise UserError(
            f"model.checkpoint {folder} lacks {len(missing)} weights, first: {missing[0]}; use a complete checkpoint"
        )
    return model
