"""Figures of encoders' features as pictures, as a table and as JSON.

The pictures show singular values, similarity against distance, and the patches of a frame that one of its patches is
similar to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from vlmcap.files import replacing
from vlmcap.spectrum.figures import FrameFeatures, Spectrum, similarity_maps
from vlmcap.terminal import short_number, wide_console

_COLOURS = ("#3b6ea5", "#c7522a", "#4c956c", "#8a5fa8", "#b8860b", "#555555", "#d16ba5", "#2a9d8f")
_E = math.exp(-1)  # correlation that defines the correlation length
_MAX_LABEL = 28  # characters
_COLUMNS = {
    "width": "width",
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "directions_90": "for 90 %",
    "similarity_neighbour": "neighbours alike",
    "similarity_mean": "all alike",
    "correlation_length": "correlation length",
    "outlier_share": "outliers",
    "cls_norm": "CLS norm",
}


@dataclass(frozen=True, slots=True)
class EncoderSpectrum:
    """An encoder's figures.

    Attributes:
        name: Name in tables and pictures.
        layer: Layer that is read, as `encoder.feature_layer`.
        spectrum: Figures of its features.
        frame: Features of one frame.
        picture: This frame, uint8 (H, W, 3), or None.
        layers: Layer number to figures; empty unless requested.
    """

    name: str
    layer: int
    spectrum: Spectrum
    frame: FrameFeatures
    picture: Tensor | None = None
    layers: Mapping[str, Spectrum] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name, or the end of a long one such as a checkpoint's path."""
        # The "…" takes one of the characters.
        return self.name if len(self.name) <= _MAX_LABEL else f"…{self.name[1 - _MAX_LABEL :]}"


def draw_spectrum(one: EncoderSpectrum, file: Path) -> None:
    """Draws a PNG of one encoder, which is written atomically."""
    rows, columns = one.frame.grid
    queries = [row * columns + column for row, column in _queries(rows, columns)]
    num_maps = len(queries) + 1
    figure = Figure(figsize=(3 * num_maps, 6.2), layout="constrained")
    # matplotlib's stub returns one subfigure or an array.
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    upper, lower = halves
    # 1. Above: singular values, and similarity against distance.
    values, alike = upper.subplots(1, 2)
    _draw_values(values, [one])
    _draw_locality(alike, one)
    upper.suptitle(
        f"{one.label}, layer {one.layer}: effective rank {one.spectrum.effective_rank:.1f} of {one.spectrum.width}",
        fontsize=11,
    )
    # 2. Below: the frame, and a map for each of the chosen patches, in one colour scale.
    axes = lower.subplots(1, num_maps)
    _draw_frame(axes[0], one, queries)
    maps = similarity_maps(one.frame, queries)
    low = min(float(maps.min()), 0.0)  # negative similarities extend the scale
    image = None
    for index, (query, plot) in enumerate(zip(queries, axes[1:], strict=True)):
        image = plot.imshow(maps[index].numpy(), cmap="viridis", vmin=low, vmax=1)
        plot.plot(query % columns, query // columns, "+", color="red", markersize=10)  # column and row of the patch
        plot.set_title(f"alike patch {'ABC'[index]}", fontsize=9)
        plot.axis("off")
    assert image is not None
    lower.colorbar(image, ax=list(axes[1:]), shrink=0.8, label="cosine similarity")
    _save(figure, file)


def draw_comparison(spectra: Sequence[EncoderSpectrum], file: Path) -> None:
    """Draws a PNG of several encoders, which is written atomically."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    values, alike, ranks = figure.subplots(1, 3)
    _draw_values(values, spectra)
    for colour, one in zip(_cycle(len(spectra)), spectra, strict=True):
        alike.plot(
            one.spectrum.locality.distances, one.spectrum.locality.correlation, ".-", color=colour, label=one.label
        )
    _label_locality(alike)
    positions = range(len(spectra))
    shares = [one.spectrum.effective_rank / one.spectrum.width for one in spectra]
    bars = ranks.barh(positions, shares, color=_cycle(len(spectra)))
    ranks.bar_label(
        bars, [f"{one.spectrum.effective_rank:.1f} of {one.spectrum.width}" for one in spectra], padding=3, fontsize=8
    )
    ranks.set_yticks(list(positions), [one.label for one in spectra], fontsize=8)
    ranks.invert_yaxis()
    ranks.margins(x=0.35)
    ranks.set_xlabel("effective rank, share of the width")
    _save(figure, file)


def _queries(rows: int, columns: int) -> list[tuple[int, int]]:
    """Returns up to three patches: the centre, and two off it towards opposite corners."""
    patches = [(rows // 2, columns // 2), (rows // 5, columns // 5), (rows - 1 - rows // 5, columns - 1 - columns // 5)]
    return list(dict.fromkeys(patches))


def _draw_values(axes: Any, spectra: Sequence[EncoderSpectrum]) -> None:
    for colour, one in zip(_cycle(len(spectra)), spectra, strict=True):
        values = one.spectrum.values
        shown = values[values > values[0] * 1e-6] if len(values) else values
        axes.semilogy(range(1, len(shown) + 1), shown / values[0].clamp_min(1e-300), color=colour, label=one.label)
    axes.set(xlabel="direction", ylabel="singular value over the largest")
    axes.grid(alpha=0.3)
    if len(spectra) > 1:
        axes.legend(fontsize=8)


def _draw_locality(axes: Any, one: EncoderSpectrum) -> None:
    curve = one.spectrum.locality
    axes.plot(curve.distances, curve.similarity, ".-", color=_COLOURS[1], label="cosine similarity")
    axes.plot(curve.distances, curve.correlation, ".-", color=_COLOURS[0], label="correlation")
    _label_locality(axes)
    if curve.length is not None:
        axes.axvline(curve.length, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(
            f"{curve.length:.1f} patches", (curve.length, _E), xytext=(4, 4), textcoords="offset points", fontsize=8
        )


def _label_locality(axes: Any) -> None:
    axes.axhline(_E, color="#999999", linestyle=":", linewidth=1)
    axes.set(xlabel="distance in patches", ylabel="mean over pairs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_frame(axes: Any, one: EncoderSpectrum, queries: Sequence[int]) -> None:
    rows, columns = one.frame.grid
    axes.set_title("frame and patches", fontsize=9)
    axes.axis("off")
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)  # in patches, as the maps beside it
    picture = one.picture.numpy() if one.picture is not None else [[[230, 230, 230]]]
    axes.imshow(picture, extent=extent)
    for index, query in enumerate(queries):
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0}
        axes.text(
            query % columns, query // columns, "ABC"[index], ha="center", va="center", fontsize=8, color="red", bbox=box
        )


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _save(figure: Figure, file: Path) -> None:
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=110)


def spectra_record(spectra: Sequence[EncoderSpectrum]) -> dict[str, Any]:
    """Returns everything that was measured, as plain data."""
    return {one.name: {"feature_layer": one.layer, **_record(one.spectrum), "layers": _layers(one)} for one in spectra}


def print_spectra(spectra: Sequence[EncoderSpectrum]) -> None:
    """Prints a row per encoder and, where requested, a row per layer below it."""
    first = spectra[0].spectrum
    title = f"Patch features of {first.num_frames} frames, {first.num_tokens} patches in the ranks"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("encoder", *_COLUMNS.values()):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for one in spectra:
        table.add_row(one.label, *_cells(one.spectrum))
        for number, layer in one.layers.items():
            table.add_row(f"  layer {number}", *_cells(layer))
    wide_console().print(table)


def _cells(spectrum: Spectrum) -> list[str]:
    figures = spectrum.figures()
    return [_shown(key, figures[key], spectrum) for key in _COLUMNS]


def _shown(key: str, value: float | int | None, spectrum: Spectrum) -> str:
    if value is None:
        return f"> {spectrum.locality.distances[-1]:.0f}" if key == "correlation_length" else "–"
    if key == "outlier_share":
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else short_number(value)


def _record(spectrum: Spectrum) -> dict[str, Any]:
    return {
        **spectrum.figures(),
        "singular_values": [round(value, 6) for value in spectrum.values.tolist()],
        "distances": list(spectrum.locality.distances),
        "similarity": list(spectrum.locality.similarity),
        "correlation": list(spectrum.locality.correlation),
    }


def _layers(one: EncoderSpectrum) -> dict[str, Any]:
    return {number: _record(spectrum) for number, spectrum in one.layers.items()}
