"""Reads run folders; missing or broken files become warnings, never errors."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from vlmcap.config.sweep import OF_A_SWEEP
from vlmcap.errors import UserError
from vlmcap.reporting.report.records import Status

ReadYaml = Callable[[Path], Any]
"""Function that reads a YAML file as plain data; it may raise any exception for an invalid file."""

_RUN_FILES = ("summary.json", "status.json", "metrics.jsonl", ".hydra/overrides.yaml")
_NOT_RUNS = {"checkpoints", "predictions", "wandb", "profile", "lightning_logs"}
_SPLITS = ("val", "test", "train")
_COUNTS = {"total": "parameters", "trained": "trained"}

MAX_POINTS = 300
"""Points of a curve; of a longer one, every n-th point and the last are kept."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Contents of a run folder. Most fields are those of `RunRow`.

    Attributes:
        path: Folder of the run.
        overrides: Overrides of this run.
        checkpoint: Checkpoint of the final scores; empty if it is not known.
        predictions: Prediction file of each split.
    """

    path: Path
    status: Status = "unfinished"
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    command: str = ""
    checkpoint: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    tokenizer: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: float | None = None
    planned_gib: float | None = None
    planned_fit_s: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    revision: str = ""
    predictions: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Finds run folders in the given folders, each once and in natural order (`10` after `9`).

    Raises:
        UserError: A folder does not exist or holds no run.
    """
    run_of: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder; give the folder of a run, or of a sweep such as multirun/<date>/<time>"
            )
        runs = list(_runs_in(folder, set()))
        if not runs:
            raise UserError(
                f"{folder} holds no run: neither it nor its subfolders contain summary.json, status.json or "
                "metrics.jsonl; give the folder of a run or of a sweep"
            )
        for run in runs:
            # A folder may be given twice, such as a run and the sweep that contains it.
            run_of.setdefault(run.resolve(), run)
    return list(run_of.values())


def read_run(folder: Path, read_yaml: ReadYaml) -> RunFolder:
    """Reads the folder of a run of `train.py` or `evaluate.py`.

    Args:
        folder: Folder of the run.
        read_yaml: Function that reads `config.yaml` and Hydra's files.
    """
    warnings: list[str] = []
    summary, status = _read_json(folder / "summary.json", warnings), _read_json(folder / "status.json", warnings)
    evaluation = _read_json(folder / "metrics.json", warnings)
    overrides = _overrides(folder, status, read_yaml)
    # 1. `train.py` leaves summary.json and status.json, `evaluate.py` leaves metrics.json.
    is_evaluation = bool(evaluation) and not (summary or status)
    # Scores of the summary replace those of an evaluation in the same folder.
    scores = _numbers(evaluation) | _numbers(_object(summary, "scores"))
    predictions = {split: path for split in _SPLITS if (path := folder / "predictions" / f"{split}.jsonl").is_file()}
    if (folder / "predictions.jsonl").is_file():
        # "test/cider" -> "test"
        split = next((name.split("/")[0] for name in _numbers(evaluation)), "test")
        predictions.setdefault(split, folder / "predictions.jsonl")
    # 2. Costs, of which a run that has failed knows only some.
    components = [counts for counts in _object(summary, "parameters").values() if isinstance(counts, dict)]
    seconds = _numbers(_object(summary, "seconds")) or _numbers({"total": status.get("seconds")})
    plan = _numbers(_object(summary, "plan")) or _numbers(_object(status, "plan"))
    return RunFolder(
        path=folder,
        status=_status(summary, status, evaluation),
        reason=str(status.get("reason") or ""),
        config=_config(folder, read_yaml, warnings),
        overrides=overrides,
        command=_evaluation_command(evaluation, overrides) if is_evaluation else _command(summary, overrides),
        checkpoint=str(evaluation.get("checkpoint") or "") if is_evaluation else _checkpoint(folder / "checkpoints"),
        scores=scores,
        tokenizer=str(summary.get("tokenizer") or evaluation.get("tokenizer") or ""),
        seconds=seconds,
        peak_memory_gib=_numbers(summary).get("peak_memory_gib"),
        planned_gib=plan.get("peak_gib"),
        planned_fit_s=plan.get("fit_s"),
        # Sums over components.
        parameters={
            name: sum(int(counts.get(key) or 0) for counts in components) for name, key in _COUNTS.items() if components
        },
        curve=read_curves(folder / "metrics.jsonl", warnings),
        revision=str(summary.get("git_revision") or ""),
        predictions=predictions,
        warnings=warnings,
    )


def read_curves(path: Path, warnings: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Reads learning curves: steps and values of the training loss, learning rates and validation metrics.

    The file also holds the final scores, which are skipped: they belong to other clips and to the best checkpoint, and
    would be a false last point.

    Args:
        path: `metrics.jsonl` of a run; it may be missing.
        warnings: List that receives a sentence about broken lines.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    num_broken = 0
    for line in _lines(path):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            num_broken += 1
            continue
        for name, value in record.items():
            if _is_curve(name, record) and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((step, float(value)))
    if num_broken:
        warnings.append(f"Skipped lines of {path.name} that cannot be read: {num_broken}.")
    return {name: _thinned(sorted(points)) for name, points in curves.items()}


def _runs_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yields the folder itself if it is a run, else the runs in its subfolders; no folder is entered twice."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    is_evaluation = (folder / "metrics.json").is_file() and (folder / "predictions.jsonl").is_file()
    if is_evaluation or any((folder / name).is_file() for name in _RUN_FILES):
        yield folder
        return
    try:
        names = [
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and entry.name[0] != "." and entry.name not in _NOT_RUNS
        ]
    except OSError:  # no permission to read
        return
    for name in sorted(
        # "run10" -> ["run", 10, ""], so that 10 follows 9
        names,
        key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)],
    ):
        yield from _runs_in(folder / name, seen)


def _read_json(path: Path, warnings: list[str]) -> dict[str, Any]:
    """Reads the object in a file; returns an empty one if the file is missing or, with a warning, broken."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    warnings.append(f"{path.name} cannot be read.")
    return {}


def _object(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """Returns the entries that are finite numbers."""
    kept = {
        # In Python, True is an int.
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {name: float(value) for name, value in kept.items() if math.isfinite(value)}


def _status(summary: dict[str, Any], status: dict[str, Any], evaluation: dict[str, Any]) -> Status:
    name = status.get("status")
    if name in get_args(Status):
        return cast(Status, name)
    return "finished" if summary or evaluation else "unfinished"


def _config(folder: Path, read_yaml: ReadYaml, warnings: list[str]) -> dict[str, Any]:
    """Reads the resolved configuration, or the one that Hydra composed if the run ended before writing it."""
    for name in ("config.yaml", "evaluation.yaml", ".hydra/config.yaml"):
        if (folder / name).is_file():
            try:
                return flatten(read_yaml(folder / name))
            except Exception:
                warnings.append(f"{name} cannot be read.")
    return {}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries to dotted keys; a list is one value, and unresolved interpolations are dropped."""
    if isinstance(value, dict):
        return {
            key: leaf
            for name, part in value.items()
            for key, leaf in flatten(part, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    # An empty prefix is a file that holds no dictionary.
    return {} if not prefix or (isinstance(value, str) and "${" in value) else {prefix: value}


def _overrides(folder: Path, status: dict[str, Any], read_yaml: ReadYaml) -> list[str]:
    try:
        overrides = read_yaml(folder / ".hydra" / "overrides.yaml")
    except Exception:  # missing or invalid
        overrides = status.get("overrides")
    return [str(override) for override in overrides] if isinstance(overrides, list) else []


def _command(summary: dict[str, Any], overrides: list[str]) -> str:
    """Returns the command that repeats a run in a new folder; for a job of a sweep, it has the job's overrides."""
    overrides = [override for override in overrides if not override.startswith(OF_A_SWEEP)]
    words = [str(word) for word in summary.get("command") or []]
    # The command of a sweep would start all of its jobs; that of one job consists of its own overrides.
    if not words or "-m" in words or "--multirun" in words:
        words = ["train.py", *overrides] if overrides or not words else words
    python = ["python"] if words[0].endswith(".py") else []  # `vlmcap train` is an executable
    return shlex.join([*python, *(word for word in words if not word.startswith("paths.output_dir="))])


def _checkpoint(folder: Path) -> str:
    return next((str(folder / name) for name in ("best.ckpt", "last.ckpt") if (folder / name).is_file()), "")


def _evaluation_command(evaluation: dict[str, Any], overrides: list[str]) -> str:
    rest = [override for override in overrides if not override.startswith(("checkpoint=", "paths.output_dir="))]
    return shlex.join(["python", "evaluate.py", f"checkpoint={evaluation.get('checkpoint', '')}", *rest])


def _is_curve(name: str, record: dict[str, Any]) -> bool:
    # Only validations during training log a loss.
    return name == "train/loss" or name.startswith("train/lr_") or (name.startswith("val/") and "val/loss" in record)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    except OSError:
        return []


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
