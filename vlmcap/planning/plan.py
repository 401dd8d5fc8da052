"""The memory, time and disk space of a configuration, printed as JSON or on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmcap.planning.hardware import GIB, DeviceInfo, detect_cpu
from vlmcap.planning.peak_memory import Moment, activations, is_weight
from vlmcap.terminal import duration, gigabytes, grouped

_WIDTH = 30  # characters of the longest bar
_SMALL = 0.1 * GIB  # smaller entries are added up
_HOST_ENTRIES = 3  # largest entries of the host's memory that are named


@dataclass(frozen=True, slots=True)
class Change:
    """An override that brings a configuration closer to fitting.

    Attributes:
        overrides: Overrides as `train.py` takes them.
        cost: What is lost by it, in words.
        peak_gib: Peak with this change and those before it in the list.
    """

    overrides: tuple[str, ...]
    cost: str
    peak_gib: float

    def plain(self) -> dict[str, Any]:
        """Returns JSON-serialisable data."""
        return {"overrides": list(self.overrides), "cost": self.cost, "peak_gib": round(self.peak_gib, 2)}


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory, time and disk space of a configuration on its device.

    Attributes:
        title: Names of the components.
        hardware: Name of the hardware profile.
        device: Memory and speed of the device.
        training: Fullest moment of a training step.
        generation: Fullest moment while captions are decoded and scored.
        host: Fullest moment of the host's memory.
        num_visual: Visual tokens per clip.
        num_text: Text tokens per clip, including the longest caption.
        num_caption: Tokens of the longest caption, read or generated.
        is_caption_assumed: Whether `num_caption` is assumed, because the data that decides it is not there.
        batch_size: Clips per micro-batch.
        eval_batch_size: Captions that are decoded at a time.
        num_frames: Frames per clip.
        flops: Floating-point operations per clip in training.
        clip_s: Seconds per clip in training.
        caption_s: Seconds to caption a clip.
        token_s: Seconds of one token of all captions that are decoded together.
        token_bytes: Bytes that such a token moves through GPU memory.
        token_launches: Kernels that such a token launches.
        is_captured: Whether these kernels are one CUDA graph.
        is_merged: Whether adapters are merged into copies of the weights for captioning.
        num_clips: Training clips, for the time of an epoch and the size of the feature store.
        cache_bytes: Bytes of a clip's features on disk.
        download_bytes: Bytes of base checkpoints that this machine does not have yet.
        is_cached: Whether features come from disk, and the encoder is not on the GPU.
        num_kept: Layers that are not recomputed under hardware.activation_budget_gib.
        not_counted: Settings of models whose size is not known on this machine.
        changes: Changes that make it fit where it does not.
    """

    title: str
    hardware: str
    device: DeviceInfo
    training: Moment
    generation: Moment
    host: Moment
    num_visual: int
    num_text: int
    num_caption: int
    is_caption_assumed: bool
    batch_size: int
    eval_batch_size: int
    num_frames: int
    flops: float
    clip_s: float
    caption_s: float
    token_s: float
    token_bytes: float
    token_launches: float
    is_captured: bool
    is_merged: bool
    num_clips: int
    cache_bytes: float
    download_bytes: float
    is_cached: bool
    num_kept: int = 0
    not_counted: Sequence[str] = ()
    changes: Sequence[Change] = ()

    @property
    def training_gib(self) -> float:
        """Peak of a training step: memory that PyTorch reserves, and the CUDA context."""
        return self.training.total / GIB + self.device.context_gib

    @property
    def generation_gib(self) -> float:
        """Peak of generation: memory that PyTorch reserves, and the CUDA context."""
        return self.generation.total / GIB + self.device.context_gib

    @property
    def host_gib(self) -> float:
        """Peak of the host's memory."""
        return self.host.total / GIB

    @property
    def peak_gib(self) -> float:
        """Peak of training and generation."""
        return max(self.training_gib, self.generation_gib)

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.peak_gib <= self.device.usable_gib

    @property
    def weights_gib(self) -> float:
        """Weights of all kinds, including quantisation state."""
        return sum(size for name, size in self.training.sizes.items() if is_weight(name)) / GIB

    @property
    def activations_gib(self) -> float:
        """Memory that a training step adds to weights, gradients and optimiser state at its peak."""
        return activations(self.training) / GIB

    def plain(self) -> dict[str, Any]:
        """Returns what `--json` prints; names give the units."""
        return {
            "model": self.title,
            "hardware": self.hardware,
            "fits": self.fits,
            "peak_gib": round(self.peak_gib, 3),
            "usable_gib": self.device.usable_gib,
            "training_gib": round(self.training_gib, 3),
            "generation_gib": round(self.generation_gib, 3),
            "weights_gib": round(self.weights_gib, 3),
            "activations_gib": round(self.activations_gib, 3),
            "context_gib": self.device.context_gib,
            "training": _plain_moment(self.training),
            "generation": _plain_moment(self.generation),
            "host_gib": round(self.host_gib, 3),
            "host": {"moment": self.host.name, "sizes_gib": _rounded(self.host.sizes)},
            "not_counted": list(self.not_counted),
            "visual_tokens": self.num_visual,
            "text_tokens": self.num_text,
            "caption_tokens": self.num_caption,
            "caption_tokens_assumed": self.is_caption_assumed,
            "batch_size": self.batch_size,
            "eval_batch_size": self.eval_batch_size,
            "num_frames": self.num_frames,
            "flops_per_clip": self.flops,
            "seconds_per_clip": round(self.clip_s, 4),
            "seconds_per_caption": round(self.caption_s, 4),
            "seconds_per_token": round(self.token_s, 6),
            "launches_per_token": round(self.token_launches),
            "cuda_graphs": self.is_captured,
            "merged_adapters": self.is_merged,
            "num_clips": self.num_clips,
            "seconds_per_epoch": round(self.clip_s * self.num_clips, 1),
            "cache_bytes": round(self.cache_bytes * self.num_clips),
            "download_bytes": round(self.download_bytes),
            "is_cached": self.is_cached,
            "calibrated": self.device.calibrated or None,
            "kept_layers": self.num_kept,
            "changes": [change.plain() for change in self.changes],
        }


def _plain_moment(moment: Moment) -> dict[str, Any]:
    sizes = {"allocated_gib": round(moment.allocated / GIB, 3), "reserved_gib": round(moment.total / GIB, 3)}
    return {"moment": moment.name, **sizes, "sizes_gib": _rounded(moment.sizes)}


def _rounded(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: round(size / GIB, 4) for name, size in sizes.items()}


def show_plan(plan: Plan, *, show_all: bool = False) -> None:
    """Prints where the memory goes, what the run costs, and the verdict last.

    Args:
        plan: Plan to print.
        show_all: Whether small entries are listed one by one.
    """
    console = Console(highlight=False)
    for what, moment, gib in (
        ("Training", plan.training, plan.training_gib),
        ("Generation", plan.generation, plan.generation_gib),
    ):
        # The rest is what the allocator holds without using it.
        tensors = f", {moment.allocated / GIB:.1f} of it tensors" if moment.allocated < moment.total else ""
        console.print(f"{what}: {gib:.1f} GiB at its peak{tensors} ({moment.name})", style="bold", markup=False)
        table = Table(box=None, show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right")
        table.add_column(no_wrap=True)
        for name, size in _rows(moment, plan.device.context_gib, show_all):
            table.add_row(name, f"{size:.2f} GiB", "█" * round(_WIDTH * size / max(gib, 1e-9)))
        console.print(table)
    console.print(_costs(plan))
    for change in plan.changes:
        console.print(f"  {' '.join(change.overrides):<40} {change.peak_gib:5.1f} GiB   {change.cost}", markup=False)
    console.print(_verdict(plan), style="bold green" if plan.fits else "bold red", markup=False)


def _rows(moment: Moment, context_gib: float, show_all: bool) -> list[tuple[str, float]]:
    large = {name: size for name, size in moment.sizes.items() if show_all or size >= _SMALL}
    rest = sum(size for name, size in moment.sizes.items() if name not in large)
    rows = [(name, size / GIB) for name, size in large.items()] + ([("smaller entries", rest / GIB)] if rest else [])
    return [*rows, ("CUDA context", context_gib)] if context_gib else rows


def _costs(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    epoch = duration(plan.clip_s * plan.num_clips)
    table.add_row(
        "a clip",
        f"{plan.num_frames} frames, {grouped(plan.num_visual)} visual and {grouped(plan.num_text)} text tokens",
    )
    source = " (assumed; set data.root to count the captions)" if plan.is_caption_assumed else ""
    table.add_row("captions", f"up to {grouped(plan.num_caption)} tokens{source}")
    table.add_row("arithmetic", f"{plan.flops / 1e12:.1f} TFLOP per clip in training")
    table.add_row(
        "an epoch", f"about {epoch} for {grouped(plan.num_clips)} clips, {duration(plan.caption_s)} to caption a clip"
    )
    table.add_row("captioning", f"{plan.eval_batch_size} at a time")
    download = f"{gigabytes(plan.download_bytes)} to download" if plan.download_bytes else "nothing to download"
    table.add_row("host", _host(plan.host))
    table.add_row("disk", f"{gigabytes(plan.cache_bytes * plan.num_clips)} for stored features, {download}")
    if plan.not_counted:
        table.add_row("not counted", f"{' and '.join(plan.not_counted)}, as its config.json is not on this machine")
    if plan.device.calibrated:
        table.add_row("figures", f"calibrated on {plan.device.calibrated}")
    return table


def _host(host: Moment) -> str:
    """Describes the host's memory, its largest entries, and the memory of this machine."""
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in [*host.sizes.items()][:_HOST_ENTRIES])
    total_gib = detect_cpu().total_gib
    machine = f"; this machine has {total_gib:.1f}" if total_gib else ""
    return f"{host.total / GIB:.1f} GiB of memory while {host.name} ({largest}){machine}"


def _verdict(plan: Plan) -> str:
    has = f"{plan.device.usable_gib:.1f} GiB of hardware={plan.hardware}"
    if plan.fits:
        return f"{plan.title}, batch {plan.batch_size}: fits, {plan.peak_gib:.1f} of {has}."
    if not plan.changes:
        hint = "no known change makes it fit; choose a smaller llm or a larger GPU."
    elif plan.changes[-1].peak_gib <= plan.device.usable_gib:
        hint = "the changes above, in order of lost quality, make it fit."
    else:
        hint = "the changes above are not enough; choose a smaller llm or a larger GPU."
    return f"{plan.title}, batch {plan.batch_size}: does not fit, {plan.peak_gib:.1f} of {has}; {hint}"
