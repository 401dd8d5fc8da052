"""The memory, time and disk space that a configuration takes: as numbers, as JSON and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmcap.planning.hardware import GIB, DeviceInfo, detect_cpu
from vlmcap.planning.memory import Moment, activations, is_weight
from vlmcap.terminal import duration, gigabytes, grouped

_WIDTH = 30  # characters of the longest bar
_SMALL = 0.1 * GIB  # parts below are added up
_HOST_PARTS = 3  # of the host's memory that are named


@dataclass(frozen=True, slots=True)
class Change:
    """A way to make a configuration fit.

    Attributes:
        overrides: As `train.py` takes them.
        cost: What is lost by it, for people.
        peak_gib: With it, and with those in front of it in the list.
    """

    overrides: tuple[str, ...]
    cost: str
    peak_gib: float

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"overrides": list(self.overrides), "cost": self.cost, "peak_gib": round(self.peak_gib, 2)}


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory, time and disk of a configuration on its GPU.

    Attributes:
        title: What the model is made of.
        hardware: Name of the profile.
        gpu: Its figures.
        training: The fullest moment of a training step.
        generation: The fullest moment while captions are written and scored.
        host: The fullest moment of the host's memory.
        num_visual: Visual tokens of a clip.
        num_text: Text tokens of a clip, the longest caption included.
        num_caption: Tokens of the longest caption, read or written.
        is_caption_assumed: Whether that is an assumption, as the data that decides it is not there.
        batch_size: Clips a micro-batch.
        eval_batch_size: Clips that are captioned together.
        num_frames: Of a clip.
        flops: Of a clip in training.
        clip_s: Seconds a clip in training.
        caption_s: Seconds to caption a clip.
        token_s: Of them, of one token of a whole evaluation batch.
        token_bytes: Bytes that such a token moves through the GPU's memory.
        token_launches: Kernels that such a token launches.
        is_captured: Whether they are launched as one CUDA graph.
        is_merged: Whether adapters are merged into copies of the weights for captions.
        num_clips: That an epoch and the store of features are counted for.
        cache_bytes: Of a clip's features on disk.
        download_bytes: Weights of the bases that this machine does not have yet.
        is_cached: Features come from disk, and the encoder is not on the GPU.
        num_kept: Layers that are not computed again under hardware.activation_budget_gib.
        not_counted: Settings of models whose size is not known here.
        changes: That make it fit where it does not.
    """

    title: str
    hardware: str
    gpu: DeviceInfo
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
        """Peak of a training step: what PyTorch reserves, and the context."""
        return self.training.total / GIB + self.gpu.context_gib

    @property
    def generation_gib(self) -> float:
        """Peak of generation: what PyTorch reserves, and the context."""
        return self.generation.total / GIB + self.gpu.context_gib

    @property
    def host_gib(self) -> float:
        """Peak of the host's memory."""
        return self.host.total / GIB

    @property
    def peak_gib(self) -> float:
        """The higher of both."""
        return max(self.training_gib, self.generation_gib)

    @property
    def fits(self) -> bool:
        """Whether the GPU holds it."""
        return self.peak_gib <= self.gpu.usable_gib

    @property
    def weights_gib(self) -> float:
        """Weights of all kinds, quantisation state included."""
        return sum(size for name, size in self.training.parts.items() if is_weight(name)) / GIB

    @property
    def activations_gib(self) -> float:
        """What a training step adds to weights, gradients and optimiser state at its peak."""
        return activations(self.training) / GIB

    def plain(self) -> dict[str, Any]:
        """As `--json` prints it; GiB, seconds and bytes as the names say."""
        return {
            "model": self.title,
            "hardware": self.hardware,
            "fits": self.fits,
            "peak_gib": round(self.peak_gib, 3),
            "usable_gib": self.gpu.usable_gib,
            "training_gib": round(self.training_gib, 3),
            "generation_gib": round(self.generation_gib, 3),
            "weights_gib": round(self.weights_gib, 3),
            "activations_gib": round(self.activations_gib, 3),
            "context_gib": self.gpu.context_gib,
            "training": _plain_moment(self.training),
            "generation": _plain_moment(self.generation),
            "host_gib": round(self.host_gib, 3),
            "host": {"moment": self.host.name, "parts_gib": _rounded(self.host.parts)},
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
            "calibrated": self.gpu.calibrated or None,
            "kept_layers": self.num_kept,
            "changes": [change.plain() for change in self.changes],
        }


def _plain_moment(moment: Moment) -> dict[str, Any]:
    sizes = {"allocated_gib": round(moment.allocated / GIB, 3), "reserved_gib": round(moment.total / GIB, 3)}
    return {"moment": moment.name, **sizes, "parts_gib": _rounded(moment.parts)}


def _rounded(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(size / GIB, 4) for name, size in parts.items()}


def show_plan(plan: Plan, *, is_pretrained_vlm: bool = False) -> None:
    """Prints where the memory goes, what it costs, and the verdict last.

    Args:
        plan: What is shown.
        is_pretrained_vlm: Small parts one by one.
    """
    console = Console(highlight=False)
    for what, moment, gib in (
        ("Training", plan.training, plan.training_gib),
        ("Generation", plan.generation, plan.generation_gib),
    ):
        tensors = f", {moment.allocated / GIB:.1f} of it tensors" if moment.allocated < moment.total else ""
        console.print(f"{what}: {gib:.1f} GiB at its peak{tensors} ({moment.name})", style="bold", markup=False)
        table = Table(box=None, show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right")
        table.add_column(no_wrap=True)
        for name, size in _rows(moment, plan.gpu.context_gib, is_pretrained_vlm):
            table.add_row(name, f"{size:.2f} GiB", "█" * round(_WIDTH * size / max(gib, 1e-9)))
        console.print(table)
    console.print(_costs(plan))
    for change in plan.changes:
        console.print(f"  {' '.join(change.overrides):<40} {change.peak_gib:5.1f} GiB   {change.cost}", markup=False)
    console.print(_verdict(plan), style="bold green" if plan.fits else "bold red", markup=False)


def _rows(moment: Moment, context_gib: float, is_pretrained_vlm: bool) -> list[tuple[str, float]]:
    large = {name: size for name, size in moment.parts.items() if is_pretrained_vlm or size >= _SMALL}
    rest = sum(size for name, size in moment.parts.items() if name not in large)
    rows = [(name, size / GIB) for name, size in large.items()] + ([("smaller parts", rest / GIB)] if rest else [])
    return [*rows, ("CUDA context", context_gib)] if context_gib else rows


def _costs(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    epoch = duration(plan.clip_s * plan.num_clips)
    table.add_row(
        "a clip",
        f"{plan.num_frames} frames, {grouped(plan.num_visual)} visual and {grouped(plan.num_text)} text tokens",
    )
    source = ", assumed: name data.root, and its captions decide" if plan.is_caption_assumed else ""
    table.add_row("captions", f"up to {grouped(plan.num_caption)} tokens{source}")
    table.add_row("arithmetic", f"{plan.flops / 1e12:.1f} TFLOP a clip in training")
    table.add_row(
        "an epoch", f"about {epoch} for {grouped(plan.num_clips)} clips, {duration(plan.caption_s)} to caption one"
    )
    table.add_row("captioning", f"{plan.eval_batch_size} at a time")
    download = f"{gigabytes(plan.download_bytes)} to download" if plan.download_bytes else "nothing to download"
    table.add_row("host", _host(plan.host))
    table.add_row("disk", f"{gigabytes(plan.cache_bytes * plan.num_clips)} for stored features, {download}")
    if plan.not_counted:
        table.add_row("not counted", f"{' and '.join(plan.not_counted)}, whose config.json is not here")
    if plan.gpu.calibrated:
        table.add_row("figures", f"calibrated on {plan.gpu.calibrated}")
    return table


def _host(host: Moment) -> str:
    """The host's memory, what takes most of it, and what is here."""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in [*host.parts.items()][:_HOST_PARTS])
    here = detect_cpu().total_gib
    machine = f"; this machine has {here:.1f}" if here else ""
    return f"{host.total / GIB:.1f} GiB of memory while {host.name} ({parts}){machine}"


def _verdict(plan: Plan) -> str:
    has = f"{plan.gpu.usable_gib:.1f} GiB of hardware={plan.hardware}"
    if plan.fits:
        return f"{plan.title}, batch {plan.batch_size}: fits, {plan.peak_gib:.1f} of {has}."
    if not plan.changes:
        mend = "nothing known here makes it fit: take a smaller llm or a larger GPU."
    elif plan.changes[-1].peak_gib <= plan.gpu.usable_gib:
        mend = "the changes above, in order of lost quality, make it fit."
    else:
        mend = "the changes above do not suffice: take a smaller llm or a larger GPU."
    return f"{plan.title}, batch {plan.batch_size}: does not fit, {plan.peak_gib:.1f} of {has}; {mend}"
