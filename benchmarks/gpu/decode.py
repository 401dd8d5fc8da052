"""Milliseconds per caption token by number of slots, engine, deterministic mode, autocast's cache and adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import limits
from benchmarks.gpu.counting import launches
from benchmarks.gpu.models import Prepared, prepare, prompt_batch
from benchmarks.gpu.registry import Place
from benchmarks.gpu.rows import Report
from benchmarks.gpu.true_size import PROFILED, timed
from vlmcap.config import Engine, Precision
from vlmcap.determinism import deterministic_kernels
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.types import Batch

SLOT_COUNTS = (1, 8, 32)
NUM_TOKENS = 8  # of the captions that are timed


@dataclass(frozen=True, slots=True)
class Cell:
    """A way to decode captions.

    Attributes:
        engine: Native, or transformers'.
        has_adapters: Whether LoRA runs; without it, a step launches what merged weights would.
        is_deterministic: Whether the caller trains in deterministic mode.
        has_cache: Whether autocast caches its casts, which Lightning's does not.
    """

    engine: Engine
    has_adapters: bool = True
    is_deterministic: bool = False
    has_cache: bool = False

    def __str__(self) -> str:
        words = [self.engine.value, "adapters" if self.has_adapters else "no adapters"]
        words += ["deterministic"] if self.is_deterministic else []
        return ", ".join([*words, *(["autocast's cache"] if self.has_cache else [])])


def matrix(report: Report, place: Place) -> None:
    """Measures Qwen3-8B in 4 bits with LoRA and short prompts, every cell at 1, 8 and 32 slots."""
    prepared = prepare(place, "decode")
    captioner = prepared.captioner.eval()
    found: dict[tuple[Cell, int], float] = {}
    flags = list(itertools.product((True, False), (False, True), (False, True)))
    cells = [Cell(engine, *chosen) for engine in (Engine.native, Engine.hf) for chosen in flags]
    for num_slots in SLOT_COUNTS[: 2 if place.is_tiny else None]:
        prompts = prompt_batch(prepared, num_slots).to(captioner.device)
        for cell in cells:
            write = _writer(captioner, prepared, prompts, cell, num_slots)
            write(2)  # warm-up: allocates memory and chooses kernels
            seconds = timed(write, NUM_TOKENS, place.device) - timed(write, 1, place.device)
            found[cell, num_slots] = max(1e-9, seconds) / (NUM_TOKENS - 1)
            report.add(str(cell), f"ms per token, {_slots_text(num_slots)}", 1e3 * found[cell, num_slots])
            if not cell.is_deterministic and not cell.has_cache:
                _report_launches(report, place, write, _slots_text(num_slots), str(cell), found[cell, num_slots])
    _compare(report, found)


def _slots_text(num_slots: int) -> str:
    return f"{num_slots} slot{'s' if num_slots > 1 else ''}"


def _compare(report: Report, found: dict[tuple[Cell, int], float]) -> None:
    """Reports ratios that have bounds."""
    ours = Cell(Engine.native)
    for num_slots in dict.fromkeys(num_slots for _, num_slots in found):
        native_s = found[ours, num_slots]
        ratio = found[dataclasses.replace(ours, is_deterministic=True), num_slots] / native_s
        report.add(_slots_text(num_slots), "deterministic mode over the fastest kernels", ratio, limits.DETERMINISTIC)
        report.add(
            _slots_text(num_slots),
            "our engine over transformers'",
            native_s / found[Cell(Engine.hf), num_slots],
            limits.ENGINES,
        )
        report.add(
            _slots_text(num_slots),
            "no adapters over adapters",
            found[dataclasses.replace(ours, has_adapters=False), num_slots] / native_s,
        )
        report.add(_slots_text(num_slots), "a token over that of one slot", native_s / found[ours, 1])


def _report_launches(
    report: Report, place: Place, write: Callable[[int], Any], slots: str, case: str, token_s: float
) -> None:
    longer, shorter = (launches(lambda count=count: write(count), place.device) for count in (1 + PROFILED, 1))
    work = longer - shorter
    report.add(case, f"launches per token, {slots}", work.count / PROFILED)
    report.add(case, f"busy share, {slots}", work.busy_s / PROFILED / token_s)


def _writer(
    captioner: VideoCaptioner, prepared: Prepared, prompts: Batch, cell: Cell, num_slots: int
) -> Callable[[int], list[str]]:
    """Returns a function that decodes captions of a number of tokens."""
    precision = prepared.config.hardware.precision
    is_mixed = precision is not Precision.fp32
    kind = captioner.device.type

    def write(num_new: int) -> list[str]:
        with _generating(captioner, cell, num_slots, num_new), contextlib.ExitStack() as stack:
            stack.enter_context(deterministic_kernels(cell.is_deterministic))
            if not cell.has_adapters:
                llm: Any = captioner.llm
                stack.enter_context(llm.disable_adapter())
            if is_mixed:
                dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float16
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cell.has_cache))
            return captioner.generate(prompts)

    return write


@contextlib.contextmanager
def _generating(captioner: VideoCaptioner, cell: Cell, num_slots: int, num_new: int) -> Iterator[None]:
    chosen = captioner.generation
    rules = dataclasses.replace(chosen.rules, engine=cell.engine)
    captioner.generation = dataclasses.replace(chosen, rules=rules, num_slots=num_slots, max_new_tokens=num_new)
    try:
        yield
    finally:
        captioner.generation = chosen
