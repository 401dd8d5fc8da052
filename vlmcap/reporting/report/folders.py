"""Run folders, read as they are: what is missing or torn becomes a warning, never an error."""

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
from vlmcap.reporting.report.data import Status

ReadYaml = Callable[[Path], Any]
"""From a YAML file to plain data; raises whatever it likes for a file that is none."""

_MARKS = ("summary.json", "status.json", "metrics.jsonl", ".hydra/overrides.yaml")
_NOT_RUNS = {"checkpoints", "predictions", "wandb", "profile", "lightning_logs"}
_SPLITS = ("val", "test", "train")
_COUNTS = {"total": "parameters", "trained": "trained"}

MOST_POINTS = 300
"""Of a curve; of longer ones every second, third … point is kept, and the last."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What one folder says; the fields are those of `RunRow`, and three more.

    Attributes:
        overrides: What was typed for this run alone.
        checkpoint: That the scores at the end are of; empty where it is not known.
        predictions: The file of each split whose captions are whole.
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
    """The run folders among the given ones and below them, each once; `10` comes after `9`.

    Raises:
        UserError: A folder is not there, or holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is no folder; give the folder of a run, or of a sweep such as multirun/<date>/<time>"
            )
        runs = list(_runs_below(folder, set()))
        if not runs:
            raise UserError(f"{folder} holds no run: no summary.json, status.json or metrics.jsonl in it or below")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(folder: Path, read_yaml: ReadYaml) -> RunFolder:
    """A run of `train.py`, or what `evaluate.py` left.

    Args:
        folder: Its folder.
        read_yaml: Of `config.yaml` and Hydra's files.
    """
    warnings: list[str] = []
    summary, status = _read_json(folder / "summary.json", warnings), _read_json(folder / "status.json", warnings)
    evaluation = _read_json(folder / "metrics.json", warnings)
    overrides = _overrides(folder, status, read_yaml)
    is_evaluation = bool(evaluation) and not (summary or status)
    scores = _numbers(evaluation) | _numbers(_part(summary, "scores"))
    predictions = {split: path for split in _SPLITS if (path := folder / "predictions" / f"{split}.jsonl").is_file()}
    if (folder / "predictions.jsonl").is_file():
        split = next((name.split("/")[0] for name in _numbers(evaluation)), "test")
        predictions.setdefault(split, folder / "predictions.jsonl")
    parts = [part for part in _part(summary, "parameters").values() if isinstance(part, dict)]
    seconds = _numbers(_part(summary, "seconds")) or _numbers({"total": status.get("seconds")})
    plan = _numbers(_part(summary, "plan")) or _numbers(_part(status, "plan"))
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
        parameters={name: sum(int(part.get(key) or 0) for part in parts) for name, key in _COUNTS.items()}
        if parts
        else {},
        curve=read_course(folder / "metrics.jsonl", warnings),
        revision=str(summary.get("git_revision") or ""),
        predictions=predictions,
        warnings=warnings,
    )


def read_course(path: Path, warnings: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Metric to steps and values: the training loss, the rates, and every metric of the validations while training.

    The scores at the end, which the same file holds, are of other clips and of the best checkpoint: they would be a
    false last point.

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


def _runs_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The folder itself, or the runs below it; nothing below a run is another.

    Links are followed, but no folder is entered twice.
    """
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    is_evaluation = (folder / "metrics.json").is_file() and (folder / "predictions.jsonl").is_file()
    if is_evaluation or any((folder / mark).is_file() for mark in _MARKS):
        yield folder
        return
    try:
        names = [
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and entry.name[0] != "." and entry.name not in _NOT_RUNS
        ]
    except OSError:  # not for us to read
        return
    for name in sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    ):
        yield from _runs_below(folder / name, seen)


def _read_json(path: Path, warnings: list[str]) -> dict[str, Any]:
    """The object in a file; empty where there is none, with a warning where the file is torn."""
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


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The entries that are numbers; JSON's null, NaN and infinity are none."""
    kept = {
        name: value for name, value in record.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {name: float(value) for name, value in kept.items() if math.isfinite(value)}


def _status(summary: dict[str, Any], status: dict[str, Any], evaluation: dict[str, Any]) -> Status:
    said = status.get("status")
    if said in get_args(Status):
        return cast(Status, said)
    return "finished" if summary or evaluation else "unfinished"


def _config(folder: Path, read_yaml: ReadYaml, warnings: list[str]) -> dict[str, Any]:
    """The resolved configuration, or what Hydra composed where the run ended before it was written."""
    for name in ("config.yaml", "evaluation.yaml", ".hydra/config.yaml"):
        if (folder / name).is_file():
            try:
                return flatten(read_yaml(folder / name))
            except Exception:
                warnings.append(f"{name} cannot be read.")
    return {}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values of nested dictionaries.

    A list is a value, and a reference to another key that is not resolved is left out.
    """
    if isinstance(value, dict):
        return {
            key: leaf
            for name, part in value.items()
            for key, leaf in flatten(part, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {} if not prefix or (isinstance(value, str) and "${" in value) else {prefix: value}


def _overrides(folder: Path, status: dict[str, Any], read_yaml: ReadYaml) -> list[str]:
    try:
        said = read_yaml(folder / ".hydra" / "overrides.yaml")
    except Exception:  # there is none, or it is no YAML
        said = status.get("overrides")
    return [str(override) for override in said] if isinstance(said, list) else []


def _command(summary: dict[str, Any], overrides: list[str]) -> str:
    """A job of a sweep is repeated by its own overrides, not by the sweep's command.

    Its folder is not to be written again.
    """
    overrides = [override for override in overrides if not override.startswith(OF_A_SWEEP)]
    said = [str(word) for word in summary.get("command") or []]
    if not said or "-m" in said or "--multirun" in said:
        said = ["train.py", *overrides] if overrides or not said else said
    python = ["python"] if said[0].endswith(".py") else []  # `vlmcap train` is a command itself
    return shlex.join([*python, *(word for word in said if not word.startswith("paths.output_dir="))])


def _checkpoint(folder: Path) -> str:
    return next((str(folder / name) for name in ("best.ckpt", "last.ckpt") if (folder / name).is_file()), "")


def _evaluation_command(evaluation: dict[str, Any], overrides: list[str]) -> str:
    rest = [override for override in overrides if not override.startswith(("checkpoint=", "paths.output_dir="))]
    return shlex.join(["python", "evaluate.py", f"checkpoint={evaluation.get('checkpoint', '')}", *rest])


def _is_course(name: str, record: dict[str, Any]) -> bool:
    # Only a validation while training has a loss.
    return name == "train/loss" or name.startswith("train/lr_") or (name.startswith("val/") and "val/loss" in record)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    except OSError:
        return []


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    stride = math.ceil(len(points) / MOST_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
