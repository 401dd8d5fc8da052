"""`vlmcap doctor --measure`: training steps and short captions at true size on random weights, beside their plan."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmcap.assembly.components import device_of
from vlmcap.config import Config
from vlmcap.config_unread import NO_DATA
from vlmcap.errors import UserError, is_out_of_memory
from vlmcap.libraries import silence_libraries
from vlmcap.measuring.memory import MemoryUse
from vlmcap.measuring.random_components import random_captioner, with_blocks
from vlmcap.measuring.steps import Measured, gone_after, measured_run
from vlmcap.planning.calibration import Calibration, calibration_folder, write_calibration
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.changes import with_changes
from vlmcap.planning.estimate.sizes import sizes_of
from vlmcap.planning.hardware import GIB, DetectedDevice, detect_cpu, detect_gpu, planned_device
from vlmcap.planning.host import PROCESS_BYTES
from vlmcap.planning.known_data import known_captions, planned
from vlmcap.planning.make_plan import make_plan, with_caption_plan
from vlmcap.planning.memory import Moment, is_known
from vlmcap.planning.plan import Plan
from vlmcap.terminal import duration, short_number, step_printer
from vlmcap.training.checkpoints.load import single_process

_CLOSE = 0.02  # of a planned figure: what is called as planned
NUM_NEW = 32  # tokens of the short captions, where the configuration's are not shorter still
_MOST_CONTEXT_GIB = 2.0  # more on the GPU beside our own memory is another program's
# Planned weights, and bytes beyond them: below, what is measured is the cost of calling kernels and the noise of the
# allocator.
_LEAST_WEIGHTS_GIB, _LEAST_GIB = 0.5, 0.1
_HEADROOM = 0.85  # of the memory that ended: what a change has to come down to


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan and its measurement.

    Attributes:
        plan: Without calibration, for captions as short as the measured ones.
        measured: What the GPU did.
        gpu: As PyTorch names it.
        memory_gib: Of it.
        num_blocks: That encoder and language model were cut to; None if they were whole.
        why_not_kept: Why it says nothing of later plans; empty if it does.
    """

    plan: Plan
    measured: Measured
    gpu: str
    memory_gib: float
    num_blocks: int | None
    why_not_kept: str = ""

    @property
    def training_gib(self) -> float:
        """What the GPU held at most in training: the allocator's memory and the context."""
        return self.measured.training.reserved + self.measured.context_gib

    @property
    def generation_gib(self) -> float:
        """The same of generation."""
        return self.measured.generation.reserved + self.measured.context_gib

    @property
    def ratios(self) -> dict[str, float]:
        """Measured over planned: of memory and seconds."""
        plan, measured = self.plan, self.measured
        return {
            "training_gib": self.training_gib / plan.training_gib,
            "generation_gib": self.generation_gib / plan.generation_gib,
            "seconds_per_clip": measured.clip_s / plan.clip_s,
            "seconds_per_token": measured.token_s / plan.token_s,
        }

    def calibration(self) -> Calibration:
        """What later plans of this GPU take from it.

        Raises:
            ValueError: The measurement is too far from the plan to make a sound figure.
        """
        plan, measured = self.plan, self.measured
        beyond, known = _beyond_gib(plan.training), plan.training.total / GIB - _beyond_gib(plan.training)
        arithmetic_s = plan.flops / (plan.gpu.utilisation * plan.gpu.peak_flops)
        # Moving packed weights keeps its planned seconds; a tenth of the measured ones at least are arithmetic.
        measured_s = max(measured.clip_s - (plan.clip_s - arithmetic_s), 0.1 * measured.clip_s)
        # The planned bound is the one that was measured; the other one cannot have been slower than what was measured.
        share = plan.token_bytes / (plan.gpu.bytes_per_s * measured.token_s)
        kernel = "kernel_s" if plan.is_captured else "launch_s"
        planned_s, measured_s_each = getattr(plan.gpu, kernel), measured.token_s / plan.token_launches
        is_launch_bound = plan.token_s == plan.token_launches * planned_s
        kernels = {"launch_s": plan.gpu.launch_s, "kernel_s": plan.gpu.kernel_s}
        kernels[kernel] = measured_s_each if is_launch_bound else min(measured_s_each, planned_s)
        return Calibration(
            gpu=self.gpu,
            memory_gib=round(self.memory_gib, 2),
            hardware=plan.hardware,
            date=datetime.date.today().isoformat(),
            model=plan.title,
            beyond_ratio=(measured.training.reserved - known) / beyond,
            context_gib=max(0.0, measured.context_gib),
            utilisation=plan.gpu.utilisation * arithmetic_s / measured_s,
            bandwidth_share=max(share, plan.gpu.bandwidth_share) if is_launch_bound else share,
            **kernels,
            tokens_per_s=self.tokens_per_s,
        )

    @property
    def tokens_per_s(self) -> float:
        """Caption tokens a second, over all clips of an evaluation batch."""
        return self.plan.eval_batch_size / self.measured.token_s

    def plain(self) -> dict[str, Any]:
        """As `--json` prints it; GiB and seconds as the names say."""
        plan, measured, ratios = self.plan, self.measured, self.ratios
        phases = {"training": (plan.training_gib, plan.training, measured.training, self.training_gib)}
        phases["generation"] = (plan.generation_gib, plan.generation, measured.generation, self.generation_gib)
        memory = {
            phase: {
                "planned_gib": round(planned, 3),
                "measured_gib": round(total, 3),
                "planned_allocated_gib": round(moment.allocated / GIB, 3),
                "allocated_gib": round(use.allocated, 3),
                "reserved_gib": round(use.reserved, 3),
                "ratio": round(ratios[f"{phase}_gib"], 3),
            }
            for phase, (planned, moment, use, total) in phases.items()
        }
        seconds = {
            "seconds_per_clip": (plan.clip_s, measured.clip_s),
            "seconds_per_token": (plan.token_s, measured.token_s),
        }
        return {
            "model": plan.title,
            "hardware": plan.hardware,
            "GPU": self.gpu,
            "blocks": self.num_blocks,
            "batch_size": plan.batch_size,
            "eval_batch_size": plan.eval_batch_size,
            **memory,
            "process_gib": {"planned": round(PROCESS_BYTES / GIB, 3), "measured": round(measured.process_gib, 3)},
            "context_gib": {"planned": plan.gpu.context_gib, "measured": round(measured.context_gib, 3)},
            **{
                name: {"planned": round(planned, 5), "measured": round(found, 5), "ratio": round(ratios[name], 3)}
                for name, (planned, found) in seconds.items()
            },
            "tokens_per_s": round(self.tokens_per_s, 2),
            "caption_tokens": measured.num_new,
            "kept": not self.why_not_kept,
            "why_not_kept": self.why_not_kept or None,
        }


def measure(overrides: Sequence[str], num_blocks: int | None = None) -> Comparison:
    """The plan of a configuration beside what this machine did; kept for later plans where it says something of them.

    Args:
        overrides: As `train.py` takes them; data.root is not needed.
        num_blocks: That encoder and language model are cut to; None takes all.

    Raises:
        UserError: Something in the configuration does not do, or the memory ended.
    """
    silence_libraries()
    overrides = [NO_DATA, *overrides]
    config = single_process(planned(overrides))
    _check(config)
    lengths = known_captions(config) or CaptionLengths.assumed(config.llm.caption_tokens)
    device_of(config)
    with tempfile.TemporaryDirectory(prefix="vlmcap-measure-") as folder:
        cut = config if num_blocks is None else with_blocks(config, num_blocks, Path(folder))
        short = dataclasses.replace(cut.llm, max_new_tokens=min(NUM_NEW, cut.llm.new_tokens))
        measured_config = with_caption_plan(dataclasses.replace(cut, llm=short))
        plan = make_plan(measured_config, planned_device(measured_config), captions=lengths)
        present = _present(config)
        _check_room(plan, present, config)
        measured = _measured(measured_config, plan, lengths, overrides, Path(folder))
    comparison = Comparison(plan, measured, present.name, present.total_gib, num_blocks)
    comparison = dataclasses.replace(comparison, why_not_kept=_obstacle(comparison, present))
    return comparison if comparison.why_not_kept else _kept(config, comparison)


def _check(config: Config) -> None:
    if config.llm.new_tokens < 2:
        raise UserError(f"llm.max_new_tokens must be at least 2 to time a token, not {config.llm.new_tokens}")
    if config.cache.enabled is True and config.cache.pooled:
        raise UserError("pooled features cannot be measured; set cache.pooled=false")


def _present(config: Config) -> DetectedDevice:
    gpu = None if config.hardware.accelerator == "cpu" else detect_gpu()
    return gpu or detect_cpu()


def _check_room(plan: Plan, present: DetectedDevice, config: Config) -> None:
    """A host that runs out of memory ends programs without a word, so there it is refused; a GPU says so itself.

    Raises:
        UserError: The plan is larger than what is free on the host.
    """
    if not present.free_gib or plan.peak_gib <= present.free_gib:
        return
    sentence = (
        f"{plan.title} needs {plan.peak_gib:.1f} GiB by its plan and {present.name} has {present.free_gib:.1f} free"
    )
    if config.hardware.accelerator == "cpu":
        raise UserError(
            f"{sentence}; measure less of it with --blocks 1, a smaller data.batch_size or data.eval_batch_size"
        )
    print(f"Warning: {sentence}.", file=sys.stderr, flush=True)


def _measured(config: Config, plan: Plan, lengths: CaptionLengths, overrides: Sequence[str], folder: Path) -> Measured:
    device = device_of(config)
    moment: dict[str, str] = {"doing": "making weights"}
    print_step = step_printer()

    def say(step: str) -> None:
        moment["doing"] = f"making or running: {step}"
        print_step(step)

    with _explained(config, plan, overrides, moment), gone_after(device):
        use = MemoryUse(device)
        has_encoder = config.cache.enabled is not True
        captioner = random_captioner(config, has_encoder=has_encoder, num_kept_layers=plan.num_kept, say=say)
        moment["doing"] = "training"
        return measured_run(config, captioner, sizes_of(config), lengths, plan.batch_size, folder, use, say)


@contextmanager
def _explained(config: Config, plan: Plan, overrides: Sequence[str], moment: dict[str, str]) -> Iterator[None]:
    """Adds the plan's advice to the sentence on memory that ended; it is made only then, as it takes many plans."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
        if not is_out_of_memory(error):
            raise
        advice = _advice(config, plan, overrides)
        has = f"{plan.title} ran out of memory on hardware={plan.hardware} while {moment['doing']}, planned at {plan.peak_gib:.1f} GiB"
        raise UserError(f"{has} of {plan.gpu.usable_gib:.1f}; {advice}") from None


def _advice(config: Config, plan: Plan, overrides: Sequence[str]) -> str:
    """What makes it smaller: so small that it fits, or by a sixth where the plan said that it would fit."""
    gpu = dataclasses.replace(plan.gpu, usable_gib=min(plan.gpu.usable_gib, _HEADROOM * plan.peak_gib))
    whole = make_plan(planned(overrides), gpu)
    changes = with_changes(whole, overrides, gpu).changes
    if not changes:
        return "take a smaller llm or a larger GPU, or measure less of it with --blocks"
    return f"try {' '.join(override for change in changes for override in change.overrides)}, planned at {changes[-1].peak_gib:.1f} GiB"


def _obstacle(comparison: Comparison, present: DetectedDevice) -> str:
    """Why a measurement is not kept; empty if it is."""
    plan = comparison.plan
    if comparison.num_blocks is not None:
        return f"only {comparison.num_blocks} block{'s' if comparison.num_blocks > 1 else ''} of each part ran"
    if present.profile != plan.hardware:
        return f"hardware={plan.hardware} is not the profile that suits this GPU, which is {present.profile or 'none'}"
    if is_too_small(plan):
        return "the model is too small to say anything of others"
    if comparison.measured.context_gib > _MOST_CONTEXT_GIB:
        return f"other programs seem to be on the GPU: {comparison.measured.context_gib:.1f} GiB of it are not ours"
    return ""


def _kept(config: Config, comparison: Comparison) -> Comparison:
    try:
        write_calibration(calibration_folder(config), comparison.calibration())
    except ValueError:
        return dataclasses.replace(comparison, why_not_kept="it is too far from the plan to make a sound figure")
    except OSError as error:
        return dataclasses.replace(comparison, why_not_kept=f"paths.cache_dir cannot be written to ({error.strerror})")
    return comparison


def _beyond_gib(moment: Moment) -> float:
    return sum(size for name, size in moment.parts.items() if not is_known(name)) / GIB


def is_too_small(plan: Plan) -> bool:
    """Whether a plan has too little to say anything of others."""
    return plan.weights_gib < _LEAST_WEIGHTS_GIB or _beyond_gib(plan.training) < _LEAST_GIB


def show_comparison(comparison: Comparison) -> None:
    """Prints plan and measurement side by side, whether it is kept, and how far off the plan is last."""
    console = Console(highlight=False)
    plan, measured, ratios = comparison.plan, comparison.measured, comparison.ratios
    cut = (
        ""
        if comparison.num_blocks is None
        else f", {comparison.num_blocks} block{'s' if comparison.num_blocks > 1 else ''}"
    )
    table = Table(
        title=f"{plan.title}{cut}, hardware={plan.hardware}, on {comparison.gpu}",
        title_justify="left",
        title_style="bold",
    )
    for column in ("", "plan", "measured", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    memory = {
        "training": (plan.training_gib, comparison.training_gib),
        "generation": (plan.generation_gib, comparison.generation_gib),
    }
    for name, (expected, found) in memory.items():
        table.add_row(f"memory in {name}", f"{expected:.2f} GiB", f"{found:.2f} GiB", f"{ratios[f'{name}_gib']:.2f}")
    for name, moment, use in (
        ("training", plan.training, measured.training),
        ("generation", plan.generation, measured.generation),
    ):
        expected = moment.allocated / GIB
        ratio = f"{use.allocated / expected:.2f}"
        table.add_row(f"  of it by tensors, {name}", f"{expected:.2f} GiB", f"{use.allocated:.2f} GiB", ratio)
    table.add_row("  of it beside PyTorch", f"{plan.gpu.context_gib:.2f} GiB", f"{measured.context_gib:.2f} GiB", "")
    if measured.process_gib:
        table.add_row(
            "memory of the host's process", f"{PROCESS_BYTES / GIB:.2f} GiB", f"{measured.process_gib:.2f} GiB", ""
        )
    rows = {"clip": (f"a clip, batch {plan.batch_size}", plan.clip_s, measured.clip_s)}
    rows["token"] = (f"a caption token, batch {plan.eval_batch_size}", plan.token_s, measured.token_s)
    for name, (label, expected, found) in rows.items():
        table.add_row(label, duration(expected), duration(found), f"{ratios[f'seconds_per_{name}']:.2f}")
    console.print(table)
    if comparison.why_not_kept:
        console.print(f"Not kept for later plans: {comparison.why_not_kept}.", markup=False, soft_wrap=True)
    else:
        console.print(
            "Kept: `vlmcap plan` uses these figures for this GPU; `vlmcap doctor --forget` removes them.",
            markup=False,
            soft_wrap=True,
        )
    console.print(distance(comparison), style="bold", markup=False, soft_wrap=True)


def distance(comparison: Comparison) -> str:
    """How far off the plan is, in one sentence."""
    ratios = comparison.ratios
    memory = " and ".join(f"{_off(ratios[f'{name}_gib'])} in {name}" for name in ("training", "generation"))
    seconds = [
        f"{'a clip' if name == 'clip' else 'a token'} takes {short_number(ratios[f'seconds_per_{name}'])} times"
        for name in ("clip", "token")
    ]
    return f"The plan's memory is {memory}; {' and '.join(seconds)} the planned seconds."


def _off(ratio: float) -> str:
    if ratio <= 0:
        return "too small to be measured"
    if abs(ratio - 1) <= _CLOSE:
        return "right"
    return f"{abs(1 / ratio - 1):.0%} too {'low' if ratio > 1 else 'high'}"
