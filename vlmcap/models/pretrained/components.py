"""What a whole vision-language model gives when it is taken apart, and how one is read."""

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
    """A whole model as encoder, projector and language model; together they hold each of its used weights once.

    Attributes:
        encoder: Frozen vision tower, with the interface of `VisionEncoder`.
        projector: Its projector or merger, float32.
        llm: The language part with its head, frozen.
        num_tokens: (F, (h, w)) -> V without building anything, F in temporal patches where the encoder joins frames;
            picklable.
        captioner_class: Makes the captioner of (encoder, projector, llm, prompt, generation).
        visual_prefix: Text right before the visual tokens.
        visual_suffix: Text right behind them.
        visual_layout: A clip's size and times -> runs of placeholders and text between them, picklable; None for one
            run of placeholders.
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
    """Around what reads a checkpoint: its many kinds of errors become one for the user.

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
    """A model with the weights in `folder`.

    Code in the checkpoint is never run, and pickled weights may hold nothing but tensors.

    Args:
        model_class: Of transformers.
        kind: As `load_pretrained` takes it, for the error.
        folder: Checkpoint in Hugging Face layout.
        **options: Further ones of `from_pretrained`.

    Raises:
        UserError: The folder cannot be loaded, or holds only a part of the model.
    """
    with reading(kind, folder):
        model, loading = model_class.from_pretrained(
            folder, trust_remote_code=False, weights_only=True, output_loading_info=True, **options
        )
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(
            f"model.checkpoint {folder} lacks {len(missing)} weights, first: {missing[0]}; take a whole checkpoint"
        )
    return model
