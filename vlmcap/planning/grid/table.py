"""A table of peaks of memory: rows encoders, columns language models, one a hardware profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

_PIECE = 8  # characters of a line of a column's head


@dataclass(frozen=True, slots=True)
class Cell:
    """A combination.

    Attributes:
        hardware: Name of the profile.
        encoder: Name.
        llm: Name.
        usable_gib: Of the card.
        training_gib: Peak of a training step; None where the parts do not go together.
        generation_gib: Peak while captions are written.
        error: Why they do not.
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
        """The higher of both."""
        return None if self.training_gib is None or self.generation_gib is None else max(self.training_gib, self.generation_gib)

    @property
    def fits(self) -> bool:
        """Whether the card holds it."""
        return self.peak_gib is not None and self.peak_gib <= self.usable_gib

    def plain(self) -> dict[str, Any]:
        """As `--json` prints it."""
        rounded = {name: value and round(value, 2) for name, value in self._figures().items()}
        return {"hardware": self.hardware, "encoder": self.encoder, "llm": self.llm, "fits": self.fits, **rounded, "error": self.error}

    def _figures(self) -> dict[str, float | None]:
        return {
            "peak_gib": self.peak_gib,
            "usable_gib": self.usable_gib,
            "training_gib": self.training_gib,
            "generation_gib": self.generation_gib,
        }


def show_grid(cells: Sequence[Cell], console: Console | None = None) -> None:
    """Prints a table a hardware profile, in as many blocks of columns as the terminal's width asks for.

    Args:
        cells: All of a profile together, in order.
        console: Other than the terminal.
    """
    console = console or Console(highlight=False)
    for hardware in _distinct(cell.hardware for cell in cells):
        _show_one([cell for cell in cells if cell.hardware == hardware], console)
    for error in _distinct(_reason(cell) for cell in cells if cell.error):
        console.print(f"– {error}", style="dim", markup=False)


def _reason(cell: Cell) -> str:
    alike = cell.error.replace(f"encoder={cell.encoder}", "that encoder")
    return f"llm={cell.llm}: {alike}" if cell.llm not in alike else alike


def _show_one(cells: Sequence[Cell], console: Console) -> None:
    usable, count = cells[0].usable_gib, sum(cell.fits for cell in cells)
    console.print(
        f"hardware={cells[0].hardware}: {count} of {len(cells)} fit in {usable:.1f} GiB; ✗ does not, – cannot be built", style="bold"
    )
    rows, columns = _distinct(cell.encoder for cell in cells), _distinct(cell.llm for cell in cells)
    found = {(cell.encoder, cell.llm): cell for cell in cells}
    first = max(map(len, rows))
    widths = {llm: 1 + max(len(piece) for piece in (*head(llm), "✗100.0")) for llm in columns}
    for block in _blocks(columns, widths, console.width - first):
        heads = {llm: head(llm) for llm in block}
        height = max(map(len, heads.values()))
        for line in range(height):
            pieces = (([""] * (height - len(heads[llm])) + heads[llm])[line].rjust(widths[llm]) for llm in block)
            console.print(Text(" " * first + "".join(pieces), style="bold"))
        for encoder in rows:
            text = Text(encoder.ljust(first))
            for llm in block:
                text.append(*_shown(found[encoder, llm], widths[llm]))
            console.print(text)
        console.print()


def _shown(cell: Cell, width: int) -> tuple[str, str]:
    if cell.peak_gib is None:
        return "–".rjust(width), "dim"
    return (f"{cell.peak_gib:.1f}".rjust(width), "green") if cell.fits else (f"✗{cell.peak_gib:.1f}".rjust(width), "red")


def head(name: str) -> list[str]:
    """A name in short lines, broken at its underscores."""
    lines: list[str] = []
    for piece in name.split("_"):
        if lines and len(lines[-1]) + 1 + len(piece) <= _PIECE:
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
