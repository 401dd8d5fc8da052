"""`vlmcap plan --grid`: the plans of encoders × language models × hardware, composed and traced in fewer steps than there are cells."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmcap.compose import CUSTOM, Composed, read_yaml
from vlmcap.config import Config
from vlmcap.config_files import config_file, group_choices
from vlmcap.demo.prepare import TINY_ENCODERS
from vlmcap.errors import UserError
from vlmcap.libraries import usable_processors
from vlmcap.models.captioner import CLIPS_AT_A_TIME
from vlmcap.planning.calibration import calibrated_device
from vlmcap.planning.captioning import ways_to_merge
from vlmcap.planning.estimate.memory_profiler import NO_SIZES, FastMemoryProfiler
from vlmcap.planning.grid.grid_table import Cell
from vlmcap.planning.known_data import with_known_data
from vlmcap.planning.make_plan import make_plan
from vlmcap.terminal import transient_bar

_GROUPS = ("hardware", "encoder", "llm")
_LEFT_OUT = {"hardware": {"cpu"}, "encoder": {*TINY_ENCODERS, CUSTOM}, "llm": {"tiny", CUSTOM}}
_FOLLOWS = {
    "encoder": ("encoder", "cache"),
    "llm": ("llm", "projector", "tuning"),
}  # groups whose values come from these groups
_MOST_PROCESSES = 8
_configs: GridConfigs | None = None  # what a forked process finds
_ONE_CAPTION = (
    "data.eval_batch_size=1"  # the least that captions take: more are written at a time only where there is room
)


@dataclass(frozen=True, slots=True)
class GridNames:
    """What is combined.

    Attributes:
        hardware: Profiles.
        encoder: Rows.
        llm: Columns.
        rest: Overrides that all share.
    """

    hardware: Sequence[str]
    encoder: Sequence[str]
    llm: Sequence[str]
    rest: Sequence[str] = field(default_factory=tuple)


def grid_names(overrides: Sequence[str]) -> GridNames:
    """The names of a command line, `hardware=l4,t4` several and all that `conf/` has where a group is not named.

    Raises:
        UserError: A whole model is asked for, which leaves nothing to combine.
    """
    chosen: dict[str, list[str]] = {}
    rest = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "model" and value != "assembled":
            raise UserError(
                f"--grid combines encoders and language models, and {override} has its own; leave one of them out"
            )
        if key in _GROUPS:
            chosen.setdefault(key, []).extend(value.split(","))
        else:
            rest.append(override)
    return GridNames(**{group: chosen.get(group) or _all_names(group) for group in _GROUPS}, rest=rest)


def _all_names(group: str) -> list[str]:
    """The names of `conf/` that a group is combined over, the smallest GPU first."""
    found = [name for name in group_choices(group) if name not in _LEFT_OUT[group]]
    if group != "hardware":
        return found
    return sorted(found, key=lambda name: (float(read_yaml(config_file(f"{group}/{name}"))["memory_gib"]), name))


class GridConfigs:
    """Configurations of cells: Hydra composes each name once, and what comes from a name is exchanged in the rest.

    Args:
        names: Of the table.

    Raises:
        UserError: An override is wrong.
    """

    def __init__(self, names: GridNames) -> None:
        first = {group: getattr(names, group)[0] for group in _GROUPS}
        composed: dict[tuple[str, str], Composed] = {}
        for group in _GROUPS:
            for name in getattr(names, group):
                chosen = first | {group: name}
                composed[group, name] = Composed(
                    [_ONE_CAPTION, *names.rest, *(f"{key}={value}" for key, value in chosen.items())]
                )
        self._bases = {hardware: composed["hardware", hardware].config() for hardware in names.hardware}
        self._parts = {
            (hardware, group, name): composed["hardware", hardware].parts_with(group, composed[group, name], follows)
            for hardware in names.hardware
            for group, follows in _FOLLOWS.items()
            for name in getattr(names, group)
        }

    def config(self, hardware: str, encoder: str, llm: str) -> Config:
        """Of a cell.

        Raises:
            UserError: The names do not go together.
        """
        parts = self._parts[hardware, "encoder", encoder] | self._parts[hardware, "llm", llm]
        try:
            return with_known_data(dataclasses.replace(self._bases[hardware], **parts))
        except ValueError as error:
            raise UserError(str(error)) from error


def cells(names: GridNames) -> Iterator[tuple[str, str, str]]:
    """Hardware, encoder and language model of every cell."""
    return ((hardware, encoder, llm) for hardware in names.hardware for encoder in names.encoder for llm in names.llm)


def make_grid(names: GridNames, *, num_processes: int | None = None) -> list[Cell]:
    """Every cell of the table; Ctrl-C leaves the traces that were made.

    Args:
        names: What is combined.
        num_processes: Number of processes that trace; None takes as many as there are processors.

    Raises:
        UserError: An override is wrong.
    """
    global _configs
    _configs = GridConfigs(names)
    try:
        jobs = _jobs(names, _configs)
        rows = []
        with transient_bar("Tracing", len(jobs) + len(names.hardware)) as advance:
            for _ in _run(_trace, jobs, num_processes):
                advance()
            for row in _run(_plan_row, [(names, hardware) for hardware in names.hardware], num_processes):
                rows += row
                advance()
        return rows
    finally:
        _configs = None


def _jobs(names: GridNames, configs: GridConfigs) -> list[tuple[str, Sequence[tuple[str, str, str]]]]:
    """What is traced at once: a language model as one kind of GPU has it, largest batch first.

    An encoder with its projectors.
    """
    jobs: list[tuple[str, Sequence[tuple[str, str, str]]]] = []
    for llm in names.llm:
        kinds: dict[Any, tuple[str, str, str]] = {}
        for hardware in names.hardware:
            cell = (hardware, names.encoder[0], llm)
            config = configs.config(*cell)
            kind = (
                config.hardware.precision,
                calibrated_device(config).has_flash,
                config.llm.quantization,
                config.hardware.gradient_checkpointing,
            )
            if kind not in kinds or config.data.batch_size > configs.config(*kinds[kind]).data.batch_size:
                kinds[kind] = cell
        jobs += [("llm", [cell]) for cell in kinds.values()]
    return jobs + [("encoder", [cell for cell in cells(names) if cell[1] == encoder]) for encoder in names.encoder]


def _trace(job: tuple[str, Sequence[tuple[str, str, str]]]) -> None:
    """Makes the traces of a job, for the store."""
    what, members = job
    done = set()
    for cell in members:
        assert _configs is not None
        try:
            config = _configs.config(*cell)
            if what == "llm":
                memory_profiler = _memory_profiler(config, sizes=False)
                memory_profiler.anchors(config.llm.caption_tokens)
                memory_profiler.anchors(config.llm.caption_tokens, is_training=False)
                for is_merged in ways_to_merge(config):
                    memory_profiler.with_adapters(is_merged=is_merged).anchors(0)
                continue
            memory_profiler = _memory_profiler(config)
            for num_clips in {config.data.batch_size, CLIPS_AT_A_TIME}:
                key = (cell[0], num_clips, memory_profiler.width)
                if key not in done:
                    done.add(key)
                    memory_profiler.encoder(num_clips)
                    memory_profiler.projector(num_clips)
        except UserError:  # the cell says so
            continue


def _plan_row(job: tuple[GridNames, str]) -> list[Cell]:
    names, hardware = job
    assert _configs is not None
    row = []
    for encoder in names.encoder:
        for llm in names.llm:
            usable = 0.0
            try:
                config = _configs.config(hardware, encoder, llm)
                usable = calibrated_device(config).usable_gib
                plan = make_plan(config, memory_profiler=_memory_profiler(config))
                row.append(Cell(hardware, encoder, llm, usable, plan.training_gib, plan.generation_gib))
            except UserError as error:
                row.append(Cell(hardware, encoder, llm, usable, error=str(error)))
    return row


def _memory_profiler(config: Config, *, sizes: bool = True) -> FastMemoryProfiler:
    return FastMemoryProfiler(config, calibrated_device(config).has_flash, None if sizes else NO_SIZES)


def _run(work: Callable[[Any], Any], jobs: Sequence[Any], num_processes: int | None) -> Iterator[Any]:
    """Results in order, from forked processes, which have all that is loaded here.

    Where there are none, from this one.
    """
    count = min(num_processes or usable_processors(), _MOST_PROCESSES, len(jobs))
    if count < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("fork").Pool(count, initializer=_leave_interrupts) as pool:
        yield from pool.imap(work, jobs)


def _leave_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
