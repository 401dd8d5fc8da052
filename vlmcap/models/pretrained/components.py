"""The components of a pretrained VLM, and how its checkpoint is read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from vlmcap.errors import UserError, first_line
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.checkpoint import read_safetensors
from vlmcap.models.llm.prompt import VisualRun
from vlmcap.types import CLOCKLESS_FPS, FrameTimes, GridTHW, VisualLayout


@dataclass(frozen=True, slots=True)
class RunText:
    """Text around each run of visual tokens in the prompt, as the model's processor writes it.

    Attributes:
        start: Further text before the first run; `{count}` is the number of frames in words and `{duration}` the time
            of the last one as H:MM:SS.
        before: Text before a run; `{number}` is the number of the frame, `{seconds}` its time, and `{clock}` its time
            as MM:SS.
        after: Text after a run.
        between: Further text between two runs.
        end: Further text after the last run.
    """

    start: str = ""
    before: str = ""
    after: str = ""
    between: str = ""
    end: str = ""


@dataclass(frozen=True)
class FrameRuns:
    """Lays out one run of placeholders per frame or temporal patch, with text around it; picklable.

    Attributes:
        num_tokens: Function (F, (h, w)) -> V.
        text: Text around the runs; what follows the last one belongs to the prompt, not to the layout.
        tokenizer: Tokenizer of the language model.
        frames_per_run: Frames that share a run.
        default_grid: Size of clips without a `grid_thw`.
    """

    num_tokens: Callable[[int, tuple[int, int]], int]
    text: RunText
    tokenizer: Any
    frames_per_run: int
    default_grid: GridTHW
    _cached_ids: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, grid_thw: GridTHW | None, times_s: FrameTimes | None = None) -> Sequence[int | Sequence[int]]:
        """Returns the text before each run, and the run.

        The time of a run is the middle between the times of its first and last frame.
        """
        steps, *grid = grid_thw or self.default_grid
        span = self.frames_per_run
        # Without times, frames are spaced evenly at a fixed rate.
        times = times_s or tuple(index / CLOCKLESS_FPS for index in range(steps * span))
        assert steps == 0 or (steps - 1) * span < len(times) <= steps * span, f"{len(times)} times for {steps} runs"
        duration = timedelta(seconds=int(times[-1])) if times else timedelta()
        start = self.text.start.format(count=number_words(len(times)), duration=duration)
        runs: list[int | Sequence[int]] = []
        for index in range(steps):
            span_times = times[index * span : (index + 1) * span]
            seconds = (span_times[0] + span_times[-1]) / 2
            clock = f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"
            text = self.text.before.format(number=index + 1, seconds=seconds, clock=clock)
            runs += [self._ids((self.text.after + self.text.between if index else start) + text)]
            runs += [self.num_tokens(1, (grid[0], grid[1]))]
        return runs

    def _ids(self, text: str) -> tuple[int, ...]:
        # Few different texts occur, as times are rounded to a tenth of a second.
        if text not in self._cached_ids:
            self._cached_ids[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._cached_ids[text]


_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_words(number: int) -> str:
    """Returns a number below 1 000 in English words, and larger ones in digits."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{_ONES[number // 100]} hundred" + (f" and {number_words(number % 100)}" if number % 100 else "")
    return str(number)


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
        run_text: Text around the runs of placeholders; None for a single run.
        tokenizer: Tokenizer that encodes `run_text`; None on the meta device.
        frames_per_run: Frames that share a run.
    """

    encoder: Any
    projector: Any
    llm: nn.Module
    num_tokens: Callable[[int, tuple[int, int]], int]
    captioner_class: Callable[..., VideoCaptioner] = VideoCaptioner
    visual_prefix: str = ""
    visual_suffix: str = ""
    run_text: RunText | None = None
    tokenizer: Any = None
    frames_per_run: int = 1

    def layout(self, default_grid: GridTHW) -> VisualLayout:
        """Returns the layout of the visual tokens of a clip; without the text between them for lack of a tokenizer.

        Args:
            default_grid: Size of clips without a `grid_thw`.
        """
        if self.run_text is None or self.tokenizer is None:
            return VisualRun(self.num_tokens, default_grid)
        return FrameRuns(self.num_tokens, self.run_text, self.tokenizer, self.frames_per_run, default_grid)


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


def load_remaining(model: Any, whole: Any, folder: Path) -> None:
    """Reads the weights of the base model of a class after its tower and its language model have been removed.

    Args:
        model: Base model on the meta device; its weights become those of the folder in float32.
        whole: Model of the class around it, for the names that its published files use.
        folder: Checkpoint in Hugging Face layout.

    Raises:
        UserError: A weight is missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    wanted = {f"model.{name}": name for name in model.state_dict()}
    renamings = get_model_conversion_mapping(whole)

    def target(key: str) -> str | None:
        # The name in the file, such as "model.multi_modal_projector.…", after transformers' own renaming.
        return wanted.get(rename_source_key(key, renamings, [], whole.base_model_prefix, dict(wanted))[0])

    tensors = read_safetensors(folder, lambda key: target(key) is not None)
    weights = {str(target(key)): tensor.float() for key, tensor in tensors}
    if missing := sorted(set(wanted.values()) - weights.keys()):
        raise UserError(
            f"model.checkpoint {folder} lacks {len(missing)} weights, first: {missing[0]}; use a complete checkpoint"
        )
    # The model is on the meta device, so the tensors take the places of its parameters.
    model.load_state_dict(weights, assign=True)
