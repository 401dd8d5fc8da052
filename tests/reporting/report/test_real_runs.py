"""A report of runs that `train.py -m` really made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmcap.cli.report import make_report
from vlmcap.reporting.report.analysis import Wanted

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_sweep_of_two_jobs(real_path: list[str], tmp_path: Path) -> None:
    overrides = [override for override in real_path if not override.startswith("paths.output_dir=")]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "-m",
        *overrides,
        "projector=mlp,linear",
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr

    report = make_report([tmp_path / "multirun"], tmp_path / "report", Wanted())
    assert report.factors == ["projector"]
    assert {run.name for run in report.runs} == {"mlp", "linear"}
    assert (report.metric, report.num_clips) == ("val/cider", 3)
    for run in report.runs:
        summary = json.loads((Path(run.folder) / "summary.json").read_text())
        assert run.status == "finished"
        assert run.scores["val/cider"] == pytest.approx(summary["scores"]["val/cider"], abs=1e-5)
        assert run.parameters["trained"] > 0
        assert run.curve["train/loss"]
        assert f"projector={run.name}" in run.command
        assert "-m" not in run.command.split()
    assert sum(group.is_best for group in report.groups) == 1
    assert {len(clip.captions) for clip in report.clips} == {2}
    page = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert page.count("data:image/jpeg") + page.count("/9j/") >= 2 * len(report.clips)  # frames of the three clips
