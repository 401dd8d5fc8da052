"""The table of peaks as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vlmcap.files import replacing
from vlmcap.planning.grid.table import Cell

_FITS, _TIGHT, _TOO_LARGE, _IMPOSSIBLE = "#bfe3c0", "#f3e3a1", "#f0b9b4", "#e6e6e6"
_NEARLY = 0.9  # of the card, from which on little is left


def draw_grid(cells: Sequence[Cell], file: Path) -> None:
    """A PNG with one table a hardware profile; colour says what the sign says too."""
    profiles = list(dict.fromkeys(cell.hardware for cell in cells))
    encoders, llms = list(dict.fromkeys(cell.encoder for cell in cells)), list(dict.fromkeys(cell.llm for cell in cells))
    height = 0.32 * len(encoders) + 1.5
    figure = Figure(figsize=(2.2 + 0.62 * len(llms), height * len(profiles)), layout="constrained")
    for index, hardware in enumerate(profiles):
        axes = figure.add_subplot(len(profiles), 1, index + 1)
        _draw_one(axes, [cell for cell in cells if cell.hardware == hardware], encoders, llms)
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw_one(axes: Any, cells: Sequence[Cell], encoders: Sequence[str], llms: Sequence[str]) -> None:
    for cell in cells:
        row, column = encoders.index(cell.encoder), llms.index(cell.llm)
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=_colour(cell), edgecolor="white", linewidth=1.5))
        axes.text(column + 0.5, row + 0.5, _label(cell), ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, len(llms)), ylim=(len(encoders), 0))
    axes.set_xticks([place + 0.5 for place in range(len(llms))], llms, rotation=35, ha="right", fontsize=8)
    axes.set_yticks([place + 0.5 for place in range(len(encoders))], encoders, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(f"{cells[0].hardware}: GiB at the peak, of {cells[0].usable_gib:.1f}", fontsize=10, loc="left")
    axes.set_frame_on(False)


def _label(cell: Cell) -> str:
    return "–" if cell.peak_gib is None else f"{'' if cell.fits else '✗ '}{cell.peak_gib:.1f}"


def _colour(cell: Cell) -> str:
    if cell.peak_gib is None:
        return _IMPOSSIBLE
    return _TOO_LARGE if not cell.fits else _TIGHT if cell.peak_gib > _NEARLY * cell.usable_gib else _FITS
