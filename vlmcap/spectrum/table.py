"""Figures of encoders' features as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmcap.spectrum.figures import Spectrum
from vlmcap.spectrum.picture import EncoderSpectrum

_MIN_WIDTH = 140  # in a pipe, too
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


def spectra_record(spectra: Sequence[EncoderSpectrum]) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    return {one.name: {"feature_layer": one.layer, **_record(one.spectrum), "layers": _layers(one)} for one in spectra}


def print_spectra(spectra: Sequence[EncoderSpectrum]) -> None:
    """A row an encoder, and below it a row a layer where those were asked for."""
    first = spectra[0].spectrum
    title = f"Patch features of {first.num_frames} frames, {first.num_tokens} patches in the ranks"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("encoder", *_COLUMNS.values()):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for one in spectra:
        table.add_row(one.label, *_cells(one.spectrum))
        for number, layer in one.layers.items():
            table.add_row(f"  layer {number}", *_cells(layer))
    Console(width=max(_MIN_WIDTH, Console().width)).print(table)


def _cells(spectrum: Spectrum) -> list[str]:
    figures = spectrum.figures()
    return [_shown(key, figures[key], spectrum) for key in _COLUMNS]


def _shown(key: str, value: float | int | None, spectrum: Spectrum) -> str:
    if value is None:
        return f"> {spectrum.locality.distances[-1]:.0f}" if key == "correlation_length" else "–"
    if key == "outlier_share":
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


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
