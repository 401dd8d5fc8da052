"""A memory plan for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vlmcap.planning.cards import GIB
from vlmcap.planning.memory import Moment
from vlmcap.planning.plan import Plan
from vlmcap.terminal import duration, gigabytes, grouped

_WIDTH = 30  # characters of the longest bar
_SMALL = 0.1 * GIB  # parts below are added up


def show_plan(plan: Plan, *, is_whole: bool = False) -> None:
    """Prints where the memory goes, what it costs, and the verdict last.

    Args:
        plan: What is shown.
        is_whole: Small parts one by one.
    """
    console = Console(highlight=False)
    for what, moment, gib in (("Training", plan.training, plan.training_gib), ("Generation", plan.generation, plan.generation_gib)):
        console.print(f"{what}: {gib:.1f} GiB at its peak ({moment.name})", style="bold", markup=False)
        table = Table(box=None, show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right")
        table.add_column(no_wrap=True)
        for name, size in _rows(moment, plan.card.context_gib, is_whole):
            table.add_row(name, f"{size:.2f} GiB", "█" * round(_WIDTH * size / max(gib, 1e-9)))
        console.print(table)
    console.print(_costs(plan))
    for change in plan.changes:
        console.print(f"  {' '.join(change.overrides):<40} {change.peak_gib:5.1f} GiB   {change.cost}", markup=False)
    console.print(_verdict(plan), style="bold green" if plan.fits else "bold red", markup=False)


def _rows(moment: Moment, context_gib: float, is_whole: bool) -> list[tuple[str, float]]:
    large = {name: size for name, size in moment.parts.items() if is_whole or size >= _SMALL}
    rest = sum(size for name, size in moment.parts.items() if name not in large)
    rows = [(name, size / GIB) for name, size in large.items()] + ([("smaller parts", rest / GIB)] if rest else [])
    return [*rows, ("CUDA context", context_gib)] if context_gib else rows


def _costs(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    epoch = duration(plan.clip_s * plan.num_clips)
    table.add_row("a clip", f"{plan.num_frames} frames, {grouped(plan.num_visual)} visual and {grouped(plan.num_text)} text tokens")
    table.add_row("arithmetic", f"{plan.flops / 1e12:.1f} TFLOP a clip in training")
    table.add_row("an epoch", f"about {epoch} for {grouped(plan.num_clips)} clips, {duration(plan.caption_s)} to caption one")
    table.add_row(
        "disk", f"{gigabytes(plan.cache_bytes * plan.num_clips)} for stored features, {gigabytes(plan.download_bytes)} to download"
    )
    if plan.card.calibrated:
        table.add_row("figures", f"calibrated on {plan.card.calibrated}")
    return table


def _verdict(plan: Plan) -> str:
    has = f"{plan.card.usable_gib:.1f} GiB of hardware={plan.hardware}"
    if plan.fits:
        return f"{plan.title}, batch {plan.batch_size}: fits, {plan.peak_gib:.1f} of {has}."
    if not plan.changes:
        mend = "nothing known here makes it fit: take a smaller llm or a larger card."
    elif plan.changes[-1].peak_gib <= plan.card.usable_gib:
        mend = "the changes above, in order of lost quality, make it fit."
    else:
        mend = "the changes above do not suffice: take a smaller llm or a larger card."
    return f"{plan.title}, batch {plan.batch_size}: does not fit, {plan.peak_gib:.1f} of {has}; {mend}"
