"""Shows the peaks of memory of `vlmcap plan --grid`, a table per hardware profile, on the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vlmcap.files import replacing

_HEAD_WIDTH = 8  # characters per line of a column's head
_FITS, _TIGHT, _TOO_LARGE, _IMPOSSIBLE = "#bfe3c0", "#f3e3a1", "#f0b9b4", "#e6e6e6"
_TIGHT_SHARE = 0.9  # of the GPU's memory; above it a plan is shown as tight


@dataclass(frozen=True, slots=True)
class Cell:
    """A combination of an encoder, a language model and a hardware profile.

    Attributes:
        hardware: Name of the hardware profile.
        encoder: Name of the encoder.
        llm: Name of the language model.
        usable_gib: Memory of the GPU.
        training_gib: Peak of a training step; None where the components cannot be combined.
        generation_gib: Peak while captions are decoded.
        error: Reason why they cannot be combined.
    """

    hardware: str
    encoder: str
    llm: str
    usable_gib: float
    training_gib: float | None = None
    generation_gib: float | None = None
    error: str = ""

    @property
    def peak_gib(self) -> float | None:
        """Peak of training and generation."""
        if self.training_gib is None or self.generation_gib is None:
            return None
        return max(self.training_gib, self.generation_gib)

    @property
    def fits(self) -> bool:
        """Whether the GPU has enough memory."""
        return self.peak_gib is not None and self.peak_gib <= self.usable_gib

    def plain(self) -> dict[str, Any]:
        """Returns what `--json` prints."""
        rounded = {name: value and round(value, 2) for name, value in self._figures().items()}
        return {
            "hardware": self.hardware,
            "encoder": self.encoder,
            "llm": self.llm,
            "fits": self.fits,
            **rounded,
            "error": self.error,
        }

    def _figures(self) -> dict[str, float | None]:
        return {
            "peak_gib": self.peak_gib,
            "usable_gib": self.usable_gib,
            "training_gib": self.training_gib,
            "generation_gib": self.generation_gib,
        }


def show_grid(cells: Sequence[Cell], console: Console | None = None) -> None:
    """Prints a table per hardware profile, in as many blocks of columns as the terminal's width requires.

    Args:
        cells: Cells, sorted by hardware profile.
        console: Console to print on; None takes the terminal.
    """
    console = console or Console(highlight=False)
    for hardware in _distinct(cell.hardware for cell in cells):
        _print_hardware([cell for cell in cells if cell.hardware == hardware], console)
    for error in _distinct(_reason(cell) for cell in cells if cell.error):
        console.print(f"– {error}", style="dim", markup=False)


def _reason(cell: Cell) -> str:
    # Without the encoder's name, equal reasons become one line.
    alike = cell.error.replace(f"encoder={cell.encoder}", "that encoder")
    return f"llm={cell.llm}: {alike}" if cell.llm not in alike else alike


def _print_hardware(cells: Sequence[Cell], console: Console) -> None:
    usable, count = cells[0].usable_gib, sum(cell.fits for cell in cells)
    console.print(
        f"hardware={cells[0].hardware}: {count} of {len(cells)} fit in {usable:.1f} GiB; "
        "✗ does not fit, – cannot be built",
        style="bold",
    )
    rows, columns = _distinct(cell.encoder for cell in cells), _distinct(cell.llm for cell in cells)
    cell_of = {(cell.encoder, cell.llm): cell for cell in cells}
    first = max(map(len, rows))
    widths = {llm: 1 + max(len(piece) for piece in (*head(llm), "✗100.0")) for llm in columns}
    # As many columns side by side as the terminal is wide.
    for block in _blocks(columns, widths, console.width - first):
        heads = {llm: head(llm) for llm in block}
        height = max(map(len, heads.values()))
        for line in range(height):
            # Short heads are filled up at the top.
            pieces = (([""] * (height - len(heads[llm])) + heads[llm])[line].rjust(widths[llm]) for llm in block)
            console.print(Text(" " * first + "".join(pieces), style="bold"))
        for encoder in rows:
            text = Text(encoder.ljust(first))
            for llm in block:
                text.append(*_styled(cell_of[encoder, llm], widths[llm]))
            console.print(text)
        console.print()


def _styled(cell: Cell, width: int) -> tuple[str, str]:
    if cell.peak_gib is None:
        return "–".rjust(width), "dim"
    return (
        (f"{cell.peak_gib:.1f}".rjust(width), "green") if cell.fits else (f"✗{cell.peak_gib:.1f}".rjust(width), "red")
    )


def head(name: str) -> list[str]:
    """Splits a name into short lines at its underscores."""
    lines: list[str] = []
    for piece in name.split("_"):
        if lines and len(lines[-1]) + 1 + len(piece) <= _HEAD_WIDTH:
            lines[-1] += f"_{piece}"
        else:
            lines.append(piece)
    return lines


def _blocks(columns: Sequence[str], widths: dict[str, int], room: int) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for name in columns:
        if blocks[-1] and sum(widths[other] for other in blocks[-1]) + widths[name] > room:
            blocks.append([])
        blocks[-1].append(name)
    return blocks


def _distinct(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def draw_grid(cells: Sequence[Cell], file: Path) -> None:
    """Draws a PNG with one table per hardware profile; signs repeat what the colours mean."""
    from matplotlib.figure import Figure  # not needed for the table on the terminal

    profiles = list(dict.fromkeys(cell.hardware for cell in cells))
    encoders = list(dict.fromkeys(cell.encoder for cell in cells))
    llms = list(dict.fromkeys(cell.llm for cell in cells))
    height = 0.32 * len(encoders) + 1.5
    figure = Figure(figsize=(2.2 + 0.62 * len(llms), height * len(profiles)), layout="constrained")
    for index, hardware in enumerate(profiles):
        axes = figure.add_subplot(len(profiles), 1, index + 1)
        _draw_hardware(axes, [cell for cell in cells if cell.hardware == hardware], encoders, llms)
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _draw_hardware(axes: Any, cells: Sequence[Cell], encoders: Sequence[str], llms: Sequence[str]) -> None:
    for cell in cells:
        row, column = encoders.index(cell.encoder), llms.index(cell.llm)
        axes.barh(row + 0.5, 1, height=1, left=column, color=_colour(cell), edgecolor="white", linewidth=1.5)
        axes.text(column + 0.5, row + 0.5, _label(cell), ha="center", va="center", fontsize=8)
    # From large to small, so that the first encoder is on top.
    axes.set(xlim=(0, len(llms)), ylim=(len(encoders), 0))
    axes.set_xticks([index + 0.5 for index in range(len(llms))], llms, rotation=35, ha="right", fontsize=8)
    axes.set_yticks([index + 0.5 for index in range(len(encoders))], encoders, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(f"{cells[0].hardware}: GiB at the peak, of {cells[0].usable_gib:.1f}", fontsize=10, loc="left")
    axes.set_frame_on(False)


def _label(cell: Cell) -> str:
    return "–" if cell.peak_gib is None else f"{'' if cell.fits else '✗ '}{cell.peak_gib:.1f}"


def _colour(cell: Cell) -> str:
    if cell.peak_gib is None:
        return _IMPOSSIBLE
    return _TOO_LARGE if not cell.fits else _TIGHT if cell.peak_gib > _TIGHT_SHARE * cell.usable_gib else _FITS
