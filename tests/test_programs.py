"""`train.py` and `evaluate.py` as a user runs them: exit codes, one sentence on stderr, nothing left half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def program(name: str, overrides: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs in `folder`, where Hydra would leave its files."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, str(ROOT / name), *overrides]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def assert_refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in expected), done.stderr


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("train.py", ["encoder=siglp2"], ["encoder=siglp2 does not exist", "siglip2"]),
        ("train.py", ["data=aihub", "projector.depth=2"], ["data.root has no value"]),
        ("evaluate.py", [], ["checkpoint has no value"]),
        ("train.py", ["--batch-size", "8"], ["--batch-size is not a flag", "set data.batch_size=8"]),
        ("train.py", ["encoder=clip,siglip2"], ["train.py -m encoder=clip,siglip2"]),
        ("train.py", ["-m", "hydra/launcher=joblib"], ["set launcher=joblib"]),
        ("train.py", ["--config-dir", "missing"], ["--config-dir missing is not a folder"]),
        ("train.py", ["data.split=val"], ["data.split=val has no effect in training", "pass it to evaluate.py"]),
        ("train.py", ["sweep.budget_h=4"], ["sweep.budget_h=4 has no effect without -m"]),
    ],
)
def test_a_wrong_configuration(tmp_path: Path, name: str, overrides: list[str], expected: list[str]) -> None:
    assert_refused(program(name, overrides, tmp_path), *expected)
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_missing_data_leave_nothing_behind(real_path: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    assert_refused(
        program("train.py", [*real_path, "data.root=missing"], folder), "data.root=missing is neither a folder nor"
    )
    assert left_in(folder) == []
    assert not (tmp_path / "run").exists()


def test_cfg_shows_the_real_combination(tmp_path: Path) -> None:
    done = program("train.py", ["--cfg", "job", "encoder=siglip2", "llm=qwen3_8b", "hardware=l4"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoint: Qwen/Qwen3-8B" in done.stdout
    assert left_in(tmp_path) == []


def test_cfg_resolves(tmp_path: Path) -> None:
    done = program(
        "train.py", ["--cfg", "job", "--resolve", "--package", "paths", "paths.cache_dir=~/도심 (1)"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "output_dir: outputs/" in done.stdout
    assert f"cache_dir: {Path.home()}/도심 (1)" in done.stdout
    assert left_in(tmp_path) == []


@pytest.mark.slow
def test_train_then_evaluate(real_path: list[str], tmp_path: Path) -> None:
    """The two commands, with 4-bit weights; the second knows nothing but the checkpoint."""
    folder = tmp_path / "here"
    folder.mkdir()
    done = program("train.py", [*real_path, "llm.quantization=4bit", "trainer.max_steps=2", "data.max_clips=4"], folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["command"][0] == "train.py"
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path / 'run' / 'index.html'}: ")
    assert "best.ckpt" in (tmp_path / "run" / "index.html").read_text(encoding="utf-8")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    overrides = [
        f"checkpoint={checkpoint}",
        "data.split=val",
        "llm.max_new_tokens=3",
        f"paths.output_dir={tmp_path / 'scores'}",
    ]
    done = program("evaluate.py", overrides, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path / 'scores' / 'index.html'}: ")
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert {"val/cider", "val/bleu_4", "val/distinct_ratio"} <= metrics.keys()
    assert len((tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "command", ["train.py --help", "-m vlmcap.cli plan encoder=siglip2 llm=qwen3_8b hardware=l4", "train.py --cfg job"]
)
def test_output_that_is_no_longer_read_ends_a_command_quietly(command: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, *command.split()], stdout=writes, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writes)
    assert done.stderr == ""
    assert done.returncode in (1, 141)  # 1 is rich's own way to end
