"""Two first runs at once make the demo's clips, its tiny parts and its features once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_RUN

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("data.demo.num_train=150", "data.max_clips=24")  # enough for the second to find the first at work


@pytest.mark.slow
def test_two_first_runs_at_once_make_everything_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *(one for one in TINY_RUN if "num_train" not in one), *SIZES]
    runs = []
    for name in ("one", "two"):
        with (tmp_path / f"{name}.log").open("w") as log:
            folders = [f"paths.output_dir={tmp_path / name}", f"paths.cache_dir={cache}"]
            runs.append(
                subprocess.Popen(
                    [*command, *folders], cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        codes = [run.wait(timeout=900) for run in runs]
    finally:
        for run in runs:
            run.kill()
    logs = [(tmp_path / f"{name}.log").read_text(encoding="utf-8") for name in ("one", "two")]
    assert codes == [0, 0], "\n".join(logs)
    both = "".join(logs)
    for made in ("writing demo clips: 166 in ", "training the tiny language model: 30 in ", "training encoder=tiny: "):
        assert sum(line.startswith(made) and " so far" not in line for line in both.splitlines()) == 1, (
            f"{made}\n{both}"
        )
    pids = {run.pid for run in runs}
    waits = [
        line for line in both.splitlines() if " is being made by process " in line and line.endswith("; waiting for it")
    ]
    assert waits and {int(line.split(" is being made by process ")[1].split()[0]) for line in waits} <= pids, both
    assert all(f"{cache}/demo/" in line for line in waits)
    assert not list(cache.rglob("*.partial")) and not list((cache / "demo").glob("*/.claims/*"))
    stored = sum(path.stat().st_size for path in cache.glob("features/*/*.safetensors"))
    assert 0 < stored < 1.5 * 40 * 2 * 64 * 96 * 2, "the features of 40 clips once: frames, patches, values, bytes"
