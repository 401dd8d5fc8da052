"""Runs and sweeps that are started at the same time, or into the folder of one that lives."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.sweeping.program import Program, statuses
from vlmcap.cli import report
from vlmcap.compose import compose, read_yaml
from vlmcap.config import Config
from vlmcap.errors import InUseError
from vlmcap.locks import claimed_folder, living_owner
from vlmcap.reporting.report.analysis import Wanted
from vlmcap.training.checkpoints import export
from vlmcap.training.run import evaluate, train

FORK = multiprocessing.get_context("fork")


def leave_a_file(config: Config) -> float:
    """A run that wrote something, as its folder would go otherwise."""
    (Path(config.paths.output_dir) / "metrics.jsonl").write_text(str(config.seed))
    return 0.5


def hold(folder: Path, started: Any, end: Any) -> None:
    with claimed_folder(folder, "paths.output_dir"):
        started.set()
        end.wait(60)


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Another living process writes to a folder; its number."""
    started, end = FORK.Event(), FORK.Event()
    child = FORK.Process(target=hold, args=(folder, started, end))
    child.start()
    try:
        assert started.wait(30)
        yield child.pid or 0
    finally:
        end.set()
        child.join(30)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_runs_of_one_moment_get_folders_of_their_own(program: Program) -> None:
    for seed in range(3):
        assert program([f"seed={seed}", 'hydra.run.dir="outputs/${now:%Y}"'], leave_a_file) == 0
    folders = sorted((program.folder / "outputs").iterdir())
    assert [folder.name[4:] for folder in folders] == ["", "-2", "-3"]
    assert [(folder / "metrics.jsonl").read_text() for folder in folders] == ["0", "1", "2"]
    assert [read_yaml(folder / ".hydra" / "config.yaml")["seed"] for folder in folders] == [0, 1, 2]


@pytest.mark.slow
def test_a_run_that_comes_to_nothing_leaves_no_folder_and_takes_no_other_run_s(program: Program) -> None:
    folder = 'hydra.run.dir="outputs/${now:%Y}"'
    assert program([folder], leave_a_file) == 0
    before = files_in(program.folder)
    assert program([folder, "data=aihub", "projector.depth=2"], leave_a_file) == 2
    assert files_in(program.folder) == before and len(list((program.folder / "outputs").iterdir())) == 1


def test_a_folder_that_the_user_named_keeps_its_name(program: Program) -> None:
    for _ in range(2):
        assert program(["hydra.run.dir=outputs/mine"], leave_a_file) == 0
    assert [folder.name for folder in (program.folder / "outputs").iterdir()] == ["mine"]


@pytest.mark.parametrize("key", ["paths.output_dir", "hydra.run.dir"])
def test_a_run_into_a_live_folder_is_refused_and_changes_nothing_in_it(
    key: str, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = program.folder / "live"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")  # for which an end would be written down
    with held(folder) as owner:
        assert program([f"{key}={folder}", "seed=2"], leave_a_file) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"Error: {key}={folder} is in use by process {owner} on ") and said.count("\n") == 1
        assert files_in(folder) == [".claims/run", "config.yaml"]
    assert program.runs == []
    assert program([f"{key}={folder}", "seed=2"], leave_a_file) == 0, "and is free afterwards"


@pytest.mark.parametrize("rank", [{"RANK": "1", "LOCAL_RANK": "1"}, {"SLURM_PROCID": "1"}])
def test_processes_of_one_run_share_the_claim_of_the_first(
    rank: dict[str, str], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun and srun start them, with one explicit folder."""
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1") if "RANK" in rank else monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    folder = program.folder / "live"
    with held(folder):
        assert program([f"hydra.run.dir={folder}", "hardware.devices=2"]) == 0
        assert not (folder / ".hydra").exists(), "the first process writes it"


@pytest.mark.slow
def test_a_run_holds_its_folder_to_its_end(program: Program) -> None:
    seen: list[str | None] = []

    def look(config: Config) -> float:
        with FORK.Pool(1) as pool:
            seen.append(pool.apply(living_owner, (Path(config.paths.output_dir),)))
        return leave_a_file(config)

    assert program(["-m", "seed=0,1"], look) == 0
    assert len(seen) == 2 and all(owner and f"process {os.getpid()} " in owner for owner in seen)
    assert not list(program.folder.rglob(".claims"))


@pytest.mark.slow
def test_sweeps_of_one_moment_get_folders_of_their_own(program: Program) -> None:
    for seeds in ("0,1", "2,3"):
        assert program(["-m", f"seed={seeds}", 'hydra.sweep.dir="multirun/${now:%Y}"'], leave_a_file) == 0
    first, second = sorted((program.folder / "multirun").iterdir())
    assert second.name == f"{first.name}-2"
    assert [(second / name / "metrics.jsonl").read_text() for name in "01"] == ["2", "3"]
    assert (second / "multirun.yaml").is_file() and set(statuses(first)) == set(statuses(second)) == {"0", "1"}


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_sweep_into_a_live_one_is_refused(resume: str, program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    folder = program.folder / "live"
    with held(folder):
        assert program(["-m", "seed=0,1", f"sweep.folder={folder}", f"sweep.resume={resume}"]) == 2
        assert f"sweep.folder={folder} is in use by process" in capsys.readouterr().err
        assert files_in(folder) == [".claims/run"]
    assert program.runs == []


@pytest.mark.slow
def test_a_job_that_outlived_its_sweep_is_left_alone(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    folder = program.folder / "sweep"

    def interrupted(config: Config) -> float:
        raise KeyboardInterrupt

    assert program(["-m", "seed=0,1", f"sweep.folder={folder}"], interrupted) == 130
    before = (folder / "0" / "status.json").read_text()
    program.runs.clear()
    with held(folder / "0"):
        assert program(["-m", "seed=0,1", f"sweep.folder={folder}", "sweep.resume=true"], leave_a_file) == 1
        assert (folder / "0" / "status.json").read_text() == before
    assert [config.seed for config in program.runs] == [1]
    assert "still running, process" in capsys.readouterr().out
    assert json.loads((folder / "1" / "status.json").read_text())["status"] == "finished"


def write_report(folder: Path) -> object:
    return report.make_report([], folder, Wanted(None, None, 1, None))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: train(compose([f"paths.output_dir={folder}"])),
        lambda folder: evaluate(compose([f"paths.output_dir={folder}"]), Path("missing.ckpt")),
        write_report,
    ],
    ids=["train", "evaluate", "report"],
)
def test_whatever_writes_to_a_folder_claims_it(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_runs", lambda folders: [])
    folder = tmp_path / "live"
    with held(folder), pytest.raises(InUseError, match=rf"={folder} is in use by process|--output={folder} is in use"):
        write(folder)


def test_two_exports_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "read_checkpoint", lambda path: {"vlmcap": {"config": {}}})
    monkeypatch.setattr(export, "saved_config", lambda plain, overrides: compose(["data.root=unset"]))

    def write(config: Config, content: object, checkpoint: Path, output: Path, **_: object) -> None:
        with FORK.Pool(1) as pool:
            sentence = pool.apply(refusal_of_export, (output,))
        assert sentence.startswith(f"--output {output} is being written by process {os.getpid()} on ")
        (output / "model").mkdir(parents=True)

    monkeypatch.setattr(export, "write_export", write)
    export.export("a.ckpt", tmp_path / "models" / "mine")
    assert files_in(tmp_path) == [] and (tmp_path / "models" / "mine" / "model").is_dir()


def refusal_of_export(output: Path) -> str:
    try:
        export.export("a.ckpt", output)
    except InUseError as error:
        return str(error)
    return "it was not refused"
