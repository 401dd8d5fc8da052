"""The course of a run out of `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MOST_POINTS = 300
"""Of a curve; of longer ones every second, third … point is kept, and the last."""


def read_course(path: Path, warnings: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Metric to steps and values: the training loss, and every metric of the validations while training.

    The scores at the end, which the same file holds, are of other clips and of the best checkpoint: they would be a false last point.

    Args:
        path: The file; there may be none.
        warnings: Gets a sentence about torn lines.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    num_torn = 0
    for line in _lines(path):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            num_torn += 1
            continue
        for name, value in record.items():
            if _is_course(name, record) and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((step, float(value)))
    if num_torn:
        warnings.append(f"Lines of {path.name} that cannot be read and are left out: {num_torn}.")
    return {name: _thinned(sorted(points)) for name, points in curves.items()}


def _is_course(name: str, record: dict[str, Any]) -> bool:
    # Only a validation while training has a loss.
    return name == "train/loss" or (name.startswith("val/") and "val/loss" in record)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    except OSError:
        return []


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = math.ceil(len(points) / MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
