"""A sweep goes on over what fails, says so, leaves nothing where nothing could run, and takes up what is left."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from tests.sweeping.program import Program, statuses
from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.config_hash import config_hash
from vlmcap.errors import DoesNotFitError, UserError
from vlmcap.sweeping.job import read_status

GRID = ["-m", "projector=mlp,linear", "seed=0,1"]


def by_seed(config: Config) -> float:
    return 0.1 + config.seed / 10


def some_fail(config: Config) -> float:
    """Refused, broken, out of memory and fine."""
    match config.projector.name, config.seed:
        case "mlp", 0:
            raise DoesNotFitError("clip + qwen3_8b needs 40.0 GiB and hardware=l4 has 22.5", 40.0, 22.5)
        case "mlp", 1:
            raise RuntimeError("shapes do not match\nand more")
        case "linear", 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return 0.25


def test_a_sweep_survives_what_fails_and_says_what_became_of_each(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(GRID, some_fail) == 1
    assert len(program.runs) == 4
    found = statuses(program.sweep_folder())
    assert [found[number]["status"] for number in "0123"] == ["refused", "failed", "failed", "finished"]
    assert found["0"]["plan"] == {"peak_gib": 40.0, "usable_gib": 22.5}
    assert (found["0"]["error"], found["1"]["error"]) == ("DoesNotFitError", "RuntimeError")
    assert found["1"]["reason"] == "RuntimeError: shapes do not match"
    assert found["2"]["reason"].startswith("out of memory: CUDA out of memory")
    assert found["2"]["plan"]["usable_gib"] > 0
    assert found["3"]["objective"] == 0.25
    assert found["3"]["overrides"] == ["projector=linear", "seed=1"]
    assert found["3"]["config_hash"] == config_hash(compose(["projector=linear", "seed=1"]))
    printed = capsys.readouterr()
    assert "Best val/facts/mean: 0.2500, job 3, linear seed=1" in printed.out
    assert "3 of 4 jobs gave no result" in printed.out
    assert (
        printed.out.splitlines()[-1]
        == f"To compare the runs: vlmcap report {program.sweep_folder().relative_to(program.folder)}"
    )
    assert "shapes do not match" in printed.err
    assert "Traceback" in printed.err, "a bug keeps its traceback"


@pytest.mark.slow
def test_a_sweep_in_which_all_goes_well_exits_with_0(program: Program) -> None:
    assert program(GRID, by_seed) == 0
    assert {one["status"] for one in statuses(program.sweep_folder()).values()} == {"finished"}
    assert (program.sweep_folder() / "multirun.yaml").is_file()


@pytest.mark.slow
def test_a_combination_that_does_not_go_together_is_recorded_without_being_started(program: Program) -> None:
    assert program(["-m", "encoder=tiny,native"]) == 1
    assert [config.encoder.name for config in program.runs] == ["tiny"]
    found = statuses(program.sweep_folder())
    assert found["1"]["status"] == "refused"
    assert "has no native encoder" in found["1"]["reason"]
    assert (program.sweep_folder() / "1" / ".hydra" / "overrides.yaml").read_text() == "- encoder=native\n"


@pytest.mark.slow
def test_jobs_are_named_by_their_checkpoints_before_and_while_they_run(program: Program) -> None:
    given = ["llm=custom", "llm.checkpoint=org/First,org/Second"]
    assert program(["-m", *given], by_seed) == 0
    assert [(config.llm.name, config.llm.license) for config in program.runs] == [
        ("first", "unknown"),
        ("second", "unknown"),
    ]
    found = statuses(program.sweep_folder())
    assert found["1"]["config_hash"] == config_hash(compose(["llm=custom", "llm.checkpoint=org/Second"]))
    assert program(["llm=native", "llm.name=mine"]) == 2
    assert program.runs == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["encoder=clip,siglp2"], "encoder=siglp2 does not exist"),
        (["data.num_frame=2,4"], "no key 'data.num_frame'"),
        (["encoder=native", "seed=0,1"], "has no native encoder"),
        (["seed=0,1", "paths.output_dir=here"], "paths.output_dir would put every job of a sweep into one folder"),
        (["sweep.budget_h=1,2"], "sweep.budget_h applies to the whole sweep"),
        (["seed=interval(0,1)"], "has no values to try one by one"),
        (["seed=0,1", "sweep.resume=true"], "sweep.resume=true continues the sweep in sweep.folder"),
        (
            ["seed=0,1", "launcher.n_jobs=2"],
            "'n_jobs' is not a key of this launcher, only of launcher=joblib, ray or submitit",
        ),
    ],
)
def test_a_mistake_of_the_whole_sweep_leaves_nothing(
    program: Program, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert program(["-m", *arguments]) == 2
    assert program.runs == []
    assert [*program.folder.iterdir()] == []
    told = capsys.readouterr().err
    assert told.startswith("Error: ")
    assert expected in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_a_resumed_sweep_runs_what_is_not_finished(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    program([*GRID, "sweep.folder=here"], some_fail)
    checkpoint = program.folder / "here" / "1" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    again = [
        "-m",
        "projector=mlp,linear",
        "seed=0,1,2",
        "sweep.folder=here",
        "sweep.resume=true",
        "trainer.progress_bar=false",
    ]
    assert program(again, by_seed) == 0
    ran = [(config.projector.name, config.seed, config.checkpoint) for config in program.runs]
    assert ran == [("mlp", 0, None), ("mlp", 1, "last"), ("mlp", 2, None), ("linear", 0, None), ("linear", 2, None)]
    found = statuses(program.folder / "here")
    assert [found[number]["objective"] for number in "0123"] == [0.1, 0.2, 0.1, 0.25]
    assert found.keys() == set("012345"), "the new ones have folders of their own"
    assert "Job 3, linear seed=1: already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_it_goes_on(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(config: Config) -> float:
        if (config.projector.name, config.seed) == ("mlp", 1):
            raise KeyboardInterrupt
        return 0.5

    assert program([*GRID, "sweep.folder=here"], stopped) == 130
    found = statuses(program.folder / "here")
    assert [one["status"] for one in found.values()] == ["finished", "interrupted"]
    assert "sweep.resume=true sweep.folder=here" in capsys.readouterr().out
    assert program([*GRID, "sweep.folder=here", "sweep.resume=true"], by_seed) == 0
    assert len(program.runs) == 3


@pytest.mark.slow
def test_a_folder_that_holds_a_sweep_is_not_written_over(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    program(["-m", "seed=0,1", "sweep.folder=here"])
    assert program(["-m", "seed=0,1", "sweep.folder=here"]) == 2
    assert "already holds a sweep; set sweep.resume=true" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_that_come_to_the_same_run_once(program: Program) -> None:
    assert program(["-m", "projector=mlp", "hardware.num_workers=0,1"]) == 0
    assert len(program.runs) == 1


@pytest.mark.slow
def test_a_failed_job_holds_no_memory(program: Program) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def hungry(config: Config) -> float:
        gc.collect()
        assert not [one for one in kept if one() is not None], "the model of an earlier job is still there"
        model = torch.zeros(1000)
        kept.append(weakref.ref(model))
        raise RuntimeError(f"no training with {len(model)}")

    assert program(["-m", "seed=0,1,2"], hungry) == 1
    reasons = [one["reason"] for one in statuses(program.sweep_folder()).values()]
    assert reasons == ["RuntimeError: no training with 1000"] * 3


@pytest.mark.slow
def test_a_plain_run_leaves_a_status_and_a_refused_one_nothing(program: Program) -> None:
    def trained(config: Config) -> float:
        Path(config.paths.output_dir).mkdir(exist_ok=True)
        (Path(config.paths.output_dir) / "config.yaml").touch()
        return 0.75

    def refused(config: Config) -> float:
        raise UserError("data.root is missing")

    def broken(config: Config) -> float:
        trained(config)
        raise UserError("the loss is NaN")

    assert program(["paths.output_dir=one"], trained) == 0
    status = read_status(program.folder / "one")
    assert status is not None
    assert (status.status, status.objective, status.config_hash) == ("finished", 0.75, config_hash(compose([])))
    assert program(["paths.output_dir=two"], refused) == 2
    assert not (program.folder / "two").exists()
    assert program(["paths.output_dir=three"], broken) == 2
    status = read_status(program.folder / "three")
    assert status is not None
    assert (status.status, status.reason) == ("failed", "the loss is NaN")


@pytest.mark.parametrize(
    "overrides",
    [
        ["paths.cache_dir=x", "logger=wandb", "sweep=optuna", "launcher=ray"],
        ["callbacks=profile", "checkpoint=x"],
    ],
)
def test_the_hash_leaves_out_what_changes_no_result(overrides: list[str]) -> None:
    assert config_hash(compose(overrides)) == config_hash(compose([]))


def test_the_hash_changes_with_what_does() -> None:
    changes = ["seed=1", "data.max_clips=8", "tuning.lora.rank=4", "projector=linear", "trainer.max_steps=3"]
    found = {config_hash(compose([change])) for change in changes} | {config_hash(compose([]))}
    assert {len(one) for one in found} == {16}
    assert len(found) == 6


def test_a_status_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text(json.dumps({"status": "finished", "colour": "blue"}))
    status = read_status(tmp_path)
    assert status is not None
    assert status.is_finished
