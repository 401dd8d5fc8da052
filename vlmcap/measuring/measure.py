"""`vlmcap doctor --measure`: training steps and short captions at true size with random weights, beside their plan."""

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
from vlmcap.measuring.memory_use import MemoryMeter
from vlmcap.measuring.random_components import random_captioner, with_blocks
from vlmcap.measuring.steps import Measurement, measure_run, releasing_memory
from vlmcap.planning.calibration import Calibration, calibration_folder, write_calibration
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.changes import with_changes
from vlmcap.planning.estimate.sizes import clip_sizes
from vlmcap.planning.hardware import GIB, DetectedDevice, detect_cpu, detect_gpu, planned_device
from vlmcap.planning.host_memory import PROCESS_BYTES
from vlmcap.planning.known_data import known_captions, planned
from vlmcap.planning.make_plan import make_plan, with_caption_plan
from vlmcap.planning.peak_memory import Moment, is_known
from vlmcap.planning.plan import Plan
from vlmcap.terminal import duration, short_number, step_printer
from vlmcap.training.checkpoints.load import single_process

_CLOSE_SHARE = 0.02  # deviation from a planned figure that counts as equal
NUM_NEW = 32  # most tokens of the short captions
_MOST_CONTEXT_GIB = 2.0  # above it, other programs must be using the GPU
# Least planned weights, and other bytes: below, a measurement shows kernel launches and noise of the allocator.
_LEAST_WEIGHTS_GIB, _LEAST_GIB = 0.5, 0.1
_HEADROOM = 0.85  # share of the plan that ran out of memory, which a change has to reach


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan and its measurement.

    Attributes:
        plan: Plan without calibration, for captions as short as the measured ones.
        measured: Measurement.
        device_name: GPU name that PyTorch reports, or the CPU's model name.
        memory_gib: Memory of the device.
        num_blocks: Number of blocks that encoder and language model were truncated to; None if they were complete.
        why_not_kept: Reason why the measurement is not stored for later plans; empty if it is.
    """

    plan: Plan
    measured: Measurement
    device_name: str
    memory_gib: float
    num_blocks: int | None
    why_not_kept: str = ""

    @property
    def training_gib(self) -> float:
        """Peak of training: memory reserved by the allocator, and the CUDA context."""
        return self.measured.training.reserved + self.measured.context_gib

    @property
    def generation_gib(self) -> float:
        """Peak of generation: memory reserved by the allocator, and the CUDA context."""
        return self.measured.generation.reserved + self.measured.context_gib

    @property
    def ratios(self) -> dict[str, float]:
        """Measured over planned memory and seconds."""
        plan, measured = self.plan, self.measured
        return {
            "training_gib": self.training_gib / plan.training_gib,
            "generation_gib": self.generation_gib / plan.generation_gib,
            "seconds_per_clip": measured.clip_s / plan.clip_s,
            "seconds_per_token": measured.token_s / plan.token_s,
        }

    def calibration(self) -> Calibration:
        """Returns the figures that later plans for this device use.

        Raises:
            ValueError: The measurement is too far from the plan for a valid figure.
        """
        plan, measured = self.plan, self.measured
        # What the plan only estimates is corrected by one factor; sizes that are known exactly are taken off.
        activations = _activation_gib(plan.training)
        known = plan.training.total / GIB - activations
        arithmetic_s = plan.flops / (plan.device.utilisation * plan.device.peak_flops)
        # Moving packed weights keeps its planned seconds; arithmetic takes at least a tenth of the measured ones.
        measured_s = max(measured.clip_s - (plan.clip_s - arithmetic_s), 0.1 * measured.clip_s)
        # The bound that the plan names was measured; the other one cannot be slower than the measurement.
        share = plan.token_bytes / (plan.device.bytes_per_s * measured.token_s)
        kernel = "kernel_s" if plan.is_captured else "launch_s"
        planned_s, kernel_s = getattr(plan.device, kernel), measured.token_s / plan.token_launches
        is_launch_bound = plan.token_s == plan.token_launches * planned_s
        kernels = {"launch_s": plan.device.launch_s, "kernel_s": plan.device.kernel_s}
        kernels[kernel] = kernel_s if is_launch_bound else min(kernel_s, planned_s)
        return Calibration(
            device_name=self.device_name,
            memory_gib=round(self.memory_gib, 2),
            hardware=plan.hardware,
            date=datetime.date.today().isoformat(),
            model=plan.title,
            activation_ratio=(measured.training.reserved - known) / activations,
            context_gib=max(0.0, measured.context_gib),
            utilisation=plan.device.utilisation * arithmetic_s / measured_s,
            bandwidth_share=max(share, plan.device.bandwidth_share) if is_launch_bound else share,
            **kernels,
            tokens_per_s=self.tokens_per_s,
        )

    @property
    def tokens_per_s(self) -> float:
        """Caption tokens per second, over all clips of an evaluation batch."""
        return self.plan.eval_batch_size / self.measured.token_s

    def plain(self) -> dict[str, Any]:
        """Returns what `--json` prints; names give the units."""
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
            "device": self.device_name,
            "blocks": self.num_blocks,
            "batch_size": plan.batch_size,
            "eval_batch_size": plan.eval_batch_size,
            **memory,
            "process_gib": {"planned": round(PROCESS_BYTES / GIB, 3), "measured": round(measured.process_gib, 3)},
            "context_gib": {"planned": plan.device.context_gib, "measured": round(measured.context_gib, 3)},
            **{
                name: {"planned": round(planned, 5), "measured": round(actual, 5), "ratio": round(ratios[name], 3)}
                for name, (planned, actual) in seconds.items()
            },
            "tokens_per_s": round(self.tokens_per_s, 2),
            "caption_tokens": measured.num_new,
            "kept": not self.why_not_kept,
            "why_not_kept": self.why_not_kept or None,
        }


def measure(overrides: Sequence[str], num_blocks: int | None = None) -> Comparison:
    """Measures a configuration beside its plan, and stores the result for later plans where it is representative.

    Args:
        overrides: Overrides as `train.py` takes them; data.root is not needed.
        num_blocks: Number of blocks that encoder and language model are truncated to; None takes all.

    Raises:
        UserError: The configuration cannot be measured, or memory ran out.
    """
    silence_libraries()
    overrides = [NO_DATA, *overrides]
    config = single_process(planned(overrides))
    _check(config)
    lengths = known_captions(config) or CaptionLengths.assumed(config.llm.caption_tokens)
    device_of(config)  # refuses a missing GPU before anything is made
    with tempfile.TemporaryDirectory(prefix="vlmcap-measure-") as folder:
        truncated = config if num_blocks is None else with_blocks(config, num_blocks, Path(folder))
        # Seconds per token need no long captions.
        short = dataclasses.replace(truncated.llm, max_new_tokens=min(NUM_NEW, truncated.llm.new_tokens))
        measured_config = with_caption_plan(dataclasses.replace(truncated, llm=short))
        plan = make_plan(measured_config, planned_device(measured_config), captions=lengths)
        detected = (None if config.hardware.accelerator == "cpu" else detect_gpu()) or detect_cpu()
        _check_room(plan, detected, config)
        measured = _run(measured_config, plan, lengths, overrides, Path(folder))
    comparison = Comparison(plan, measured, detected.name, detected.total_gib, num_blocks)
    comparison = dataclasses.replace(comparison, why_not_kept=_reason_not_kept(comparison, detected))
    return comparison if comparison.why_not_kept else _keep(config, comparison)


def _check(config: Config) -> None:
    if config.llm.new_tokens < 2:
        raise UserError(f"llm.max_new_tokens must be at least 2 to time a token, but it is {config.llm.new_tokens}")
    if config.cache.enabled is True and config.cache.pooled:
        raise UserError("pooled features cannot be measured; set cache.pooled=false")


def _check_room(plan: Plan, detected: DetectedDevice, config: Config) -> None:
    """Refuses a plan that does not fit in host memory, as the system would kill the program; a GPU reports it itself.

    Raises:
        UserError: The plan needs more than the host's free memory.
    """
    # Without a figure of the free memory nothing can be compared.
    if not detected.free_gib or plan.peak_gib <= detected.free_gib:
        return
    sentence = (
        f"{plan.title} is planned to need {plan.peak_gib:.1f} GiB and {detected.name} has {detected.free_gib:.1f} free"
    )
    if config.hardware.accelerator == "cpu":
        raise UserError(
            f"{sentence}; measure a part of it with --blocks 1, or lower data.batch_size or data.eval_batch_size"
        )
    print(f"Warning: {sentence}.", file=sys.stderr, flush=True)


def _run(config: Config, plan: Plan, lengths: CaptionLengths, overrides: Sequence[str], folder: Path) -> Measurement:
    device = device_of(config)
    # Read after an error, to name the step at which memory ran out.
    progress: dict[str, str] = {"doing": "creating weights"}
    print_step = step_printer()

    def report(step: str) -> None:
        progress["doing"] = f"creating or running: {step}"
        print_step(step)

    with _with_advice(config, plan, overrides, progress), releasing_memory(device):
        meter = MemoryMeter(device)
        has_encoder = config.cache.enabled is not True
        captioner = random_captioner(config, has_encoder=has_encoder, num_kept_layers=plan.num_kept, report=report)
        progress["doing"] = "training"
        return measure_run(
            config,
            captioner,
            sizes=clip_sizes(config),
            lengths=lengths,
            batch_size=plan.batch_size,
            folder=folder,
            meter=meter,
            report=report,
        )


@contextmanager
def _with_advice(config: Config, plan: Plan, overrides: Sequence[str], progress: dict[str, str]) -> Iterator[None]:
    """Adds advice to an out-of-memory error; it is planned only then, as it takes many plans."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
        if not is_out_of_memory(error):
            raise
        advice = _advice(config, plan, overrides)
        raise UserError(
            f"{plan.title} ran out of memory on hardware={plan.hardware} while {progress['doing']}, "
            f"planned at {plan.peak_gib:.1f} GiB of {plan.device.usable_gib:.1f}; {advice}"
        ) from None


def _advice(config: Config, plan: Plan, overrides: Sequence[str]) -> str:
    """Suggests changes: those that make the plan fit, or that lower it by `_HEADROOM` where it should have fit."""
    # A plan that fitted was too low, so the changes have to reach less than it.
    device = dataclasses.replace(plan.device, usable_gib=min(plan.device.usable_gib, _HEADROOM * plan.peak_gib))
    changes = with_changes(make_plan(planned(overrides), device), overrides, device).changes
    if not changes:
        return "choose a smaller llm or a larger GPU, or measure a part of it with --blocks"
    tried = " ".join(override for change in changes for override in change.overrides)
    return f"try {tried}, planned at {changes[-1].peak_gib:.1f} GiB"


def _reason_not_kept(comparison: Comparison, detected: DetectedDevice) -> str:
    """Returns why a measurement is not stored; empty if it is."""
    plan = comparison.plan
    if comparison.num_blocks is not None:
        # Embeddings and output layer are a larger share of a truncated model.
        return f"only {_count_blocks(comparison.num_blocks)} of each component ran"
    if detected.profile != plan.hardware:
        return (
            f"hardware={plan.hardware} is not the profile that suits this device, which is {detected.profile or 'none'}"
        )
    if is_too_small(plan):
        return "the model is too small to be representative of others"
    if comparison.measured.context_gib > _MOST_CONTEXT_GIB:
        return f"other programs seem to use the GPU: {comparison.measured.context_gib:.1f} GiB of it belong to others"
    return ""


def _count_blocks(count: int) -> str:
    return f"{count} block{'s' if count > 1 else ''}"


def _keep(config: Config, comparison: Comparison) -> Comparison:
    try:
        write_calibration(calibration_folder(config), comparison.calibration())
    # The calibration checks its figures.
    except ValueError:
        return dataclasses.replace(comparison, why_not_kept="it is too far from the plan for a valid figure")
    except OSError as error:
        return dataclasses.replace(comparison, why_not_kept=f"paths.cache_dir is not writable ({error.strerror})")
    return comparison


def _activation_gib(moment: Moment) -> float:
    return sum(size for name, size in moment.sizes.items() if not is_known(name)) / GIB


def is_too_small(plan: Plan) -> bool:
    """Returns whether a plan is too small to be representative of others."""
    return plan.weights_gib < _LEAST_WEIGHTS_GIB or _activation_gib(plan.training) < _LEAST_GIB


def show_comparison(comparison: Comparison) -> None:
    """Prints plan and measurement side by side, whether the measurement is stored, and the deviation last."""
    console = Console(highlight=False)
    plan, measured, ratios = comparison.plan, comparison.measured, comparison.ratios
    blocks = "" if comparison.num_blocks is None else f", {_count_blocks(comparison.num_blocks)}"
    # 1. Memory: the whole peak, tensors alone, and what is outside of PyTorch's allocator.
    table = Table(
        title=f"{plan.title}{blocks}, hardware={plan.hardware}, on {comparison.device_name}",
        title_justify="left",
        title_style="bold",
    )
    for column in ("", "plan", "measured", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    memory = {
        "training": (plan.training_gib, comparison.training_gib),
        "generation": (plan.generation_gib, comparison.generation_gib),
    }
    for name, (expected, actual) in memory.items():
        table.add_row(f"memory in {name}", f"{expected:.2f} GiB", f"{actual:.2f} GiB", f"{ratios[f'{name}_gib']:.2f}")
    for name, moment, use in (
        ("training", plan.training, measured.training),
        ("generation", plan.generation, measured.generation),
    ):
        expected = moment.allocated / GIB
        ratio = f"{use.allocated / expected:.2f}"
        table.add_row(f"  of it tensors, {name}", f"{expected:.2f} GiB", f"{use.allocated:.2f} GiB", ratio)
    table.add_row("  of it beside PyTorch", f"{plan.device.context_gib:.2f} GiB", f"{measured.context_gib:.2f} GiB", "")
    if measured.process_gib:
        table.add_row(
            "host memory of the process", f"{PROCESS_BYTES / GIB:.2f} GiB", f"{measured.process_gib:.2f} GiB", ""
        )
    # 2. Times.
    rows = {"clip": (f"a clip, batch {plan.batch_size}", plan.clip_s, measured.clip_s)}
    rows["token"] = (f"a caption token, batch {plan.eval_batch_size}", plan.token_s, measured.token_s)
    for name, (label, expected, actual) in rows.items():
        table.add_row(label, duration(expected), duration(actual), f"{ratios[f'seconds_per_{name}']:.2f}")
    console.print(table)
    # 3. Whether later plans use the figures, and the deviation in one sentence.
    if comparison.why_not_kept:
        console.print(f"Not stored for later plans: {comparison.why_not_kept}.", markup=False, soft_wrap=True)
    else:
        console.print(
            "Stored: `vlmcap plan` uses these figures for this device; `vlmcap doctor --forget` removes them.",
            markup=False,
            soft_wrap=True,
        )
    console.print(describe_deviation(comparison), style="bold", markup=False, soft_wrap=True)


def describe_deviation(comparison: Comparison) -> str:
    """Describes the deviation from the plan in one sentence."""
    ratios = comparison.ratios
    memory = " and ".join(f"{_deviation(ratios[f'{name}_gib'])} in {name}" for name in ("training", "generation"))
    seconds = [
        f"{'a clip' if name == 'clip' else 'a token'} takes {short_number(ratios[f'seconds_per_{name}'])} times"
        for name in ("clip", "token")
    ]
    return f"The plan's memory is {memory}; {' and '.join(seconds)} the planned seconds."


def _deviation(ratio: float) -> str:
    if ratio <= 0:
        return "too small to be measured"
    if abs(ratio - 1) <= _CLOSE_SHARE:
        return "right"
    return f"{abs(1 / ratio - 1):.0%} too {'low' if ratio > 1 else 'high'}"
