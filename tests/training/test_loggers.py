"""`metrics.jsonl`, and which loggers a run has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmcap.compose import to_plain
from vlmcap.config import Config
from vlmcap.training.loggers.jsonl import JsonlLogger
from vlmcap.training.loggers.make import make_evaluation_loggers, make_loggers

MakeConfig = Callable[..., Config]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_log_step_is_one_object_on_one_line(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"train/loss": 1, "epoch": 2.0}, step=10)
    logger.log_metrics({"val/bleu_4": 0.25}, step=12)
    assert lines(logger.path) == [
        {"step": 10, "epoch": 2, "train/loss": 1.0},
        {"step": 12, "epoch": None, "val/bleu_4": 0.25},
    ]


def test_later_and_torn_lines_are_cut(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        logger.log_metrics({"train/loss": step}, step=step)
    with logger.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "epo')
    logger.drop_after(2)
    assert [row["step"] for row in lines(logger.path)] == [1, 2]
    logger.log_metrics({"train/loss": 5}, step=3)
    assert [row["step"] for row in lines(logger.path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cutting_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    JsonlLogger(tmp_path / "metrics.jsonl").drop_after(5)
    assert not list(tmp_path.iterdir())


def test_a_new_run_starts_its_file_anew(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    JsonlLogger(tmp_path / "metrics.jsonl").log_metrics({"train/loss": 1}, step=0)
    make_loggers(config, {}, tmp_path, None)
    assert lines(tmp_path / "metrics.jsonl") == []


def test_the_resolved_configuration_is_plain_data(tiny_config: MakeConfig, tmp_path: Path) -> None:
    plain = to_plain(tiny_config(tmp_path))
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(("kind", "names"), [("none", ["JsonlLogger"]), ("csv", ["JsonlLogger", "CSVLogger"])])
def test_loggers_of_files_alone(tiny_config: MakeConfig, tmp_path: Path, kind: str, names: list[str]) -> None:
    config = tiny_config(tmp_path, f"logger={kind}")
    assert [type(logger).__name__ for logger in make_loggers(config, {}, tmp_path, None)] == names
    assert make_evaluation_loggers(config, {}, tmp_path) == []
