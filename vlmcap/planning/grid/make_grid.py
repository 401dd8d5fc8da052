"""Makes the table of `vlmcap plan --grid`: plans of encoders × language models × hardware.

Names are composed and models are profiled once for many cells, so there are fewer steps than cells.
"""

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
from vlmcap.models.captioner import MAX_ENCODED_CLIPS
from vlmcap.planning.calibration import calibrated_device
from vlmcap.planning.captioning import ways_to_merge
from vlmcap.planning.estimate.memory_profiler import NO_SIZES, FastMemoryProfiler
from vlmcap.planning.grid.grid_table import Cell
from vlmcap.planning.known_data import with_known_data
from vlmcap.planning.make_plan import make_plan
from vlmcap.terminal import transient_bar

_GROUPS = ("hardware", "encoder", "llm")
_EXCLUDED = {"hardware": {"cpu"}, "encoder": {*TINY_ENCODERS, CUSTOM}, "llm": {"tiny", CUSTOM}}
# Groups whose values depend on the choice in these groups.
_DEPENDENT_GROUPS = {"encoder": ("encoder", "cache"), "llm": ("llm", "projector", "tuning")}
_MOST_PROCESSES = 8
_configs: GridConfigs | None = None  # inherited by forked processes
_ONE_CAPTION = "data.eval_batch_size=1"  # least memory for captions, as more are decoded together only where it fits


@dataclass(frozen=True, slots=True)
class GridNames:
    """Names that are combined.

    Attributes:
        hardware: Hardware profiles.
        encoder: Encoders, one per row.
        llm: Language models, one per column.
        rest: Overrides of all cells.
    """

    hardware: Sequence[str]
    encoder: Sequence[str]
    llm: Sequence[str]
    rest: Sequence[str] = field(default_factory=tuple)


def grid_names(overrides: Sequence[str]) -> GridNames:
    """Parses overrides: `hardware=l4,t4` names several, and a group that is not named takes all of `conf/`.

    Raises:
        UserError: A pretrained VLM is chosen, whose components cannot be combined.
    """
    chosen: dict[str, list[str]] = {}
    rest = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "model" and value != "assembled":
            raise UserError(
                f"--grid combines encoders and language models, but {override} brings its own; remove one of the two"
            )
        if key in _GROUPS:
            chosen.setdefault(key, []).extend(value.split(","))
        else:
            rest.append(override)
    return GridNames(**{group: chosen.get(group) or _all_names(group) for group in _GROUPS}, rest=rest)


def _all_names(group: str) -> list[str]:
    """Returns the names of `conf/` in a group, with hardware sorted by memory."""
    names = [name for name in group_choices(group) if name not in _EXCLUDED[group]]
    if group != "hardware":
        return names
    return sorted(names, key=lambda name: (float(read_yaml(config_file(f"{group}/{name}"))["memory_gib"]), name))


class GridConfigs:
    """Composes each name once, and makes the configurations of cells by exchanging what depends on a name.

    Args:
        names: Names that are combined.

    Raises:
        UserError: An override is wrong.
    """

    def __init__(self, names: GridNames) -> None:
        # Each name is composed beside the first ones of the other groups.
        first = {group: getattr(names, group)[0] for group in _GROUPS}
        composed: dict[tuple[str, str], Composed] = {}
        for group in _GROUPS:
            for name in getattr(names, group):
                chosen = first | {group: name}
                composed[group, name] = Composed(
                    [_ONE_CAPTION, *names.rest, *(f"{key}={value}" for key, value in chosen.items())]
                )
        self._hardware_configs = {hardware: composed["hardware", hardware].config() for hardware in names.hardware}
        self._components = {
            (hardware, group, name): composed["hardware", hardware].groups_with(group, composed[group, name], follows)
            for hardware in names.hardware
            for group, follows in _DEPENDENT_GROUPS.items()
            for name in getattr(names, group)
        }

    def config(self, hardware: str, encoder: str, llm: str) -> Config:
        """Returns the configuration of a cell.

        Raises:
            UserError: The names cannot be combined.
        """
        groups = self._components[hardware, "encoder", encoder] | self._components[hardware, "llm", llm]
        try:
            return with_known_data(dataclasses.replace(self._hardware_configs[hardware], **groups))
        except ValueError as error:
            raise UserError(str(error)) from error


def cells(names: GridNames) -> Iterator[tuple[str, str, str]]:
    """Yields hardware, encoder and language model of every cell."""
    return ((hardware, encoder, llm) for hardware in names.hardware for encoder in names.encoder for llm in names.llm)


def make_grid(names: GridNames, *, num_processes: int | None = None) -> list[Cell]:
    """Makes every cell of the table; Ctrl-C keeps the memory profiles that were made.

    Args:
        names: Names that are combined.
        num_processes: Number of processes; None takes as many as there are CPU cores, and at most eight.

    Raises:
        UserError: An override is wrong.
    """
    global _configs
    # Set before the pool forks, so that its processes need not compose again.
    _configs = GridConfigs(names)
    try:
        jobs = _jobs(names, _configs)
        rows = []
        with transient_bar("Profiling memory", len(jobs) + len(names.hardware)) as advance:
            for _ in _map_processes(_profile_job, jobs, num_processes):
                advance()
            for row in _map_processes(_plan_row, [(names, hardware) for hardware in names.hardware], num_processes):
                rows += row
                advance()
        return rows
    finally:
        _configs = None


def _jobs(names: GridNames, configs: GridConfigs) -> list[tuple[str, Sequence[tuple[str, str, str]]]]:
    """Returns what is profiled together: an encoder with its projectors, or a language model for one kind of GPU.

    The language model is profiled at the largest batch among the GPUs of a kind.
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
            # Of cells that share a profile, the one with the largest batch needs all that the others need.
            if kind not in kinds or config.data.batch_size > configs.config(*kinds[kind]).data.batch_size:
                kinds[kind] = cell
        jobs += [("llm", [cell]) for cell in kinds.values()]
    return jobs + [("encoder", [cell for cell in cells(names) if cell[1] == encoder]) for encoder in names.encoder]


def _profile_job(job: tuple[str, Sequence[tuple[str, str, str]]]) -> None:
    """Makes the memory profiles of a job, which are stored on disk."""
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
            for num_clips in {config.data.batch_size, MAX_ENCODED_CLIPS}:
                # Projectors of one width share their profile.
                key = (cell[0], num_clips, memory_profiler.width)
                if key not in done:
                    done.add(key)
                    memory_profiler.encoder(num_clips)
                    memory_profiler.projector(num_clips)
        except UserError:  # the cell reports it
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


def _map_processes(work: Callable[[Any], Any], jobs: Sequence[Any], num_processes: int | None) -> Iterator[Any]:
    """Maps jobs in order over forked processes, which inherit all that is loaded, or in this process without fork."""
    count = min(num_processes or usable_processors(), _MOST_PROCESSES, len(jobs))
    # Spawned processes would import everything again.
    if count < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("fork").Pool(count, initializer=_ignore_interrupts) as pool:
        yield from pool.imap(work, jobs)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the pool
