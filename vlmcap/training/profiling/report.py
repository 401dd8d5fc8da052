"""Reports a profile as a table, as `steps.json` and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmcap.files import replacing, write_json

# Phases in the order of a step, with their labels. steps.json uses the names, and loggers use `profile/<name>_s`.
LABELS = {
    "decode": "decode",
    "wait": "wait for data",
    "transfer": "transfer to the device",
    "vision": "vision encoder",
    "projector": "projector",
    "language": "language model, forward",
    "loss": "head and loss",
    "backward": "backward",
    "optimiser": "optimiser",
    "other": "other",
}
AROUND_LABELS = {
    "captions": "evaluation: captions, loss",
    "scores": "evaluation: scores",
    "rest": "evaluation: the rest",
}


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds per optimiser step, as means over the timed steps.

    Attributes:
        device: Type of the model's device.
        first_step: First timed step of this process, from 1.
        num_steps: Number of timed steps.
        clips: Clips per step.
        num_workers: Number of workers of the training loader.
        is_cached: Whether clips are read as cached features; no encoder runs then, and "decode" reads the features.
        step_s: Seconds per step, measured independently of the phases.
        phases: Seconds in the main process by name in `LABELS`; "decode" is included only without workers.
        worker_decode_s: Seconds in which workers read the clips of a step, summed over workers, in parallel to the
            step; None without workers.
        evaluation: Seconds per step by name in `AROUND_LABELS`: a mean evaluation, divided by the steps between two of
            them.
        plain_step_s: Seconds of a step that is neither timed nor traced; None if the run ended before one.
        trace: File name of the trace, or None.
    """

    device: str
    first_step: int
    num_steps: int
    clips: float
    num_workers: int
    is_cached: bool
    step_s: float
    phases: Mapping[str, float]
    worker_decode_s: float | None
    evaluation: Mapping[str, float]
    plain_step_s: float | None
    trace: str | None

    @property
    def total_s(self) -> float:
        """Seconds of a step with its share of evaluation."""
        return self.step_s + sum(self.evaluation.values())

    def rows(self) -> list[tuple[str, float]]:
        """Returns names and seconds of all phases and of evaluation.

        They add up to `total_s`, except for the overhead of the clock.
        """
        return [(name, self.phases[name]) for name in LABELS if name in self.phases] + [*self.evaluation.items()]

    def metrics(self) -> dict[str, float]:
        """Returns the metrics for loggers."""
        values = {
            f"profile/{name if name in LABELS else f'evaluation_{name}'}_s": seconds for name, seconds in self.rows()
        }
        if self.worker_decode_s is not None:
            values["profile/worker_decode_s"] = self.worker_decode_s
        return values | {"profile/step_s": self.step_s, "profile/total_s": self.total_s}


def label(times: StepTimes, name: str) -> str:
    """Returns the display name of a phase."""
    if name == "decode" and times.is_cached:
        return "read features"
    return LABELS.get(name) or AROUND_LABELS[name]


def show_times(times: StepTimes) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Where a step's time goes", title_justify="left", title_style="bold")
    for column in ("phase", "seconds per step", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name, seconds in times.rows():
        table.add_row(label(times, name), f"{seconds:.4f}", f"{seconds / times.total_s:.1%}")
    table.add_section()
    if times.evaluation:
        table.add_row("step", f"{times.step_s:.4f}", f"{times.step_s / times.total_s:.1%}")
    table.add_row("step with its share of evaluation" if times.evaluation else "step", f"{times.total_s:.4f}", "100.0%")
    Console().print(table)
    print("\n".join(notes(times)))


def notes(times: StepTimes) -> list[str]:
    """Returns the notes below the table, one per line."""
    last = times.first_step + times.num_steps - 1
    steps = f"step {last}" if times.num_steps == 1 else f"steps {times.first_step} to {last}"
    lines = [f"Means of {steps}, {times.clips:g} clips each, on {times.device}."]
    if times.worker_decode_s is not None:
        what = "read features" if times.is_cached else "decoded"
        workers = "a worker" if times.num_workers == 1 else f"{times.num_workers} workers"
        lines.append(
            f"In parallel to each step, not in the sum, {workers} {what} for {times.worker_decode_s:.4f} s in total."
        )
    if times.plain_step_s is not None:
        lines.append(f"A later step without timing took {times.plain_step_s:.4f} s.")
    return lines


def write_times(times: StepTimes, path: Path) -> None:
    """Writes `steps.json` atomically."""
    content: dict[str, Any] = asdict(times) | {"total_s": times.total_s}
    content["shares"] = {name: seconds / times.total_s for name, seconds in times.rows()}
    write_json(path, content)


def draw_times(times: StepTimes, path: Path) -> None:
    """Draws one bar per phase and writes the PNG atomically."""
    from matplotlib.figure import Figure  # slow to import, and only a profiled run needs it

    # From bottom to top in matplotlib, so the first phase is the last bar.
    rows = times.rows()[::-1]
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([label(times, name) for name, _ in rows], [seconds for _, seconds in rows], color="#3b6ea5")
    axes.bar_label(bars, [f"{seconds:.3f} s, {seconds / times.total_s:.0%}" for _, seconds in rows], padding=3)
    # Room for the labels to the right of the longest bar.
    axes.margins(x=0.25)
    axes.set_xlabel("seconds per step")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
