"""Launchers really run: processes a GPU, submitit's local executor, a local Ray.

One job fails, one is killed, the others end well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweeping.program import ROOT, statuses
from vlmcap.compose import compose
from vlmcap.config import BasicLauncherConfig, JoblibLauncherConfig
from vlmcap.errors import UserError
from vlmcap.sweeping.launchers import (
    batch_size,
    device_shares,
    import_library,
    num_parallel,
    parameters,
    visible_devices,
)


def sweep(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "sweeping" / "jobs.py"), "-m", "sweep.folder=here", *overrides]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=900, check=False)


def check(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    """Of seeds 0 to 3, where 1 raises and 2 is killed."""
    assert done.returncode == 1, done.stderr
    found = statuses(folder / "here")
    assert [found[number]["status"] for number in "0123"] == ["finished", "failed", "failed", "finished"]
    assert found["1"]["reason"] == "RuntimeError: diverged"
    assert found["2"]["reason"].startswith("its process ended without writing its status")
    assert [found[number]["objective"] for number in "0123"] == [0.0, None, None, 0.3]
    assert "Best val/facts/mean: 0.3000, job 3, seed=3" in done.stdout
    assert done.stdout.rstrip().endswith("To compare the runs: vlmcap report here")
    processes = {(folder / "here" / number / "seen.txt").read_text().split()[0] for number in "03"}
    assert len(processes) == 2, "each in a process of its own"


@pytest.mark.slow
def test_joblib_gives_each_job_its_gpu(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    done = sweep(tmp_path, "launcher=joblib", "seed=0,1,2,3", CUDA_VISIBLE_DEVICES="4,7")
    check(tmp_path, done)
    seen = {(tmp_path / "here" / number / "seen.txt").read_text().split()[1] for number in "03"}
    assert seen <= {"4", "7"}
    assert "diverged" in (tmp_path / "here" / "1" / "output.log").read_text()


@pytest.mark.slow
def test_submitit_runs_on_this_computer(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    done = sweep(
        tmp_path,
        "launcher=submitit",
        "launcher.is_local=true",
        "launcher.gpus_per_job=null",
        "launcher.n_jobs=2",
        "seed=0,1,2,3",
    )
    check(tmp_path, done)
    assert [*(tmp_path / "here" / ".submitit").iterdir()]


@pytest.mark.slow
def test_a_local_ray_runs_them(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    check(tmp_path, sweep(tmp_path, "launcher=ray", "launcher.n_jobs=2", "seed=0,1,2,3"))


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def launcher(**values: int) -> JoblibLauncherConfig:
        return JoblibLauncherConfig(**values)

    assert device_shares(launcher(), ["0", "1", "2"]) == ["0", "1", "2"]
    assert device_shares(launcher(gpus_per_job=2), ["0", "1", "2", "3"]) == ["0,1", "2,3"]
    assert device_shares(launcher(n_jobs=3), ["0", "1"]) == ["0", "1", "0"]
    assert device_shares(launcher(n_jobs=2), []) == ["", ""]
    assert device_shares(launcher(), []) == [""]
    assert device_shares(launcher(gpus_per_job=0, n_jobs=2), ["0"]) == ["", ""]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-ab")
    assert visible_devices() == ["2", "GPU-ab"]
    assert num_parallel(launcher()) == 2
    assert num_parallel(BasicLauncherConfig()) == batch_size(BasicLauncherConfig()) == 1
    assert batch_size(launcher()) is None


def test_slurm_is_told_what_the_configuration_says() -> None:
    config = compose(
        ["launcher=submitit", "launcher.partition=gpu", "launcher.n_jobs=4", "launcher.setup=[module load cuda]"]
    )
    assert parameters(config.launcher) == {
        "name": "vlmcap",
        "timeout_min": 1440,
        "gpus_per_node": 1,
        "cpus_per_task": 8,
        "mem_gb": 64,
        "slurm_partition": "gpu",
        "slurm_array_parallelism": 4,
        "slurm_setup": ["module load cuda"],
    }


def test_a_launcher_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'launcher=submitit needs submitit: pip install "vlmcap\[slurm\]"'):
        import_library("submitit")
