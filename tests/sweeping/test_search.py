"""`sweep=optuna`: what is asked, what is told, what is stopped, and how it goes on after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.sweeping.program import Program, statuses
from vlmcap.config import Config
from vlmcap.errors import TrialPruned, UserError
from vlmcap.sweeping.search import SearchSpace, read_space

optuna = pytest.importorskip("optuna")
SEARCH = ["-m", "sweep=optuna", "sweep.folder=here"]


def space_of(*overrides: str) -> SearchSpace:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return read_space(OverridesParser.create().parse_overrides([*overrides]))


def study_in(folder: Path) -> Any:
    return optuna.load_study(study_name="vlmcap", storage=f"sqlite:///{folder / 'study.db'}")


def peak(config: Config) -> float:
    """Best at a rank of 16 and a rate of 1e-3."""
    return 1 - abs(config.tuning.lora.rank - 16) / 100 - abs(math.log10(config.tuning.adapter_lr) + 3) / 10


def test_the_space_is_hydras_syntax() -> None:
    space = space_of(
        "a=8,16,32",
        "b=tag(log,interval(1e-5,1e-3))",
        "c=range(1,7,2)",
        "d=interval(1,9)",
        "e=choice(x,y)",
        "f=3",
        "g=range(0,1,0.25)",
    )
    found = {key: repr(one) for key, one in space.distributions.items()}
    assert found["a"] == "CategoricalDistribution(choices=('8', '16', '32'))"
    assert found["b"] == "FloatDistribution(high=0.001, log=True, low=1e-05, step=None)"
    assert found["c"] == "IntDistribution(high=5, log=False, low=1, step=2)"
    assert found["d"] == "IntDistribution(high=9, log=False, low=1, step=1)"
    assert found["e"] == "CategoricalDistribution(choices=('x', 'y'))"
    assert found["g"] == "FloatDistribution(high=0.75, log=False, low=0.0, step=0.25)"
    assert space.fixed == ("f=3",)
    assert space.overrides({"a": "8", "b": 1e-4, "c": 3, "d": 2, "e": "x", "g": 0.5}) == [
        "f=3",
        "a=8",
        "b=0.0001",
        "c=3",
        "d=2",
        "e=x",
        "g=0.5",
    ]
    assert len(space_of("a=1,2", "b=range(0,3)").points()) == 6
    with pytest.raises(UserError, match="sampler=grid cannot try every value of b"):
        space_of("a=1,2", "b=interval(0.0,1.0)").points()
    with pytest.raises(UserError, match="needs a key with several values"):
        space_of("a=1")
    with pytest.raises(UserError, match="is not a valid search space"):
        space_of("a=tag(log,interval(0.0,1.0))")


@pytest.mark.slow
def test_a_search_is_told_how_each_trial_ended_and_goes_on(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_failures(config: Config) -> float:
        if config.tuning.lora.rank == 8:
            raise RuntimeError("too small")
        return peak(config)

    arguments = [*SEARCH, "tuning.lora.rank=8,16", "tuning.adapter_lr=tag(log,interval(1e-5,1e-2))"]
    program([*arguments, "sweep.n_trials=3"], with_failures)
    states = [trial.state.name for trial in study_in(program.folder / "here").trials]
    assert len(states) == 3
    assert set(states) <= {"FAIL", "COMPLETE"}
    assert "FAIL" in states
    assert study_in(program.folder / "here").best_value == max(
        one["objective"] for one in statuses(program.folder / "here").values() if one["status"] == "finished"
    )
    assert "vlmcap report here" in capsys.readouterr().out.splitlines()[-1]
    program([*arguments, "sweep.n_trials=4", "sweep.resume=true"], with_failures)
    assert len(program.runs) == 1, "those of the first start count"
    assert len(study_in(program.folder / "here").trials) == 4


@pytest.mark.slow
def test_a_search_that_was_killed_runs_its_open_trial_again(program: Program) -> None:
    arguments = [*SEARCH, "sweep.n_trials=3", "tuning.lora.rank=interval(4,64)"]

    def killed(config: Config) -> float:
        if len(program.runs) == 2:
            raise KeyboardInterrupt
        return peak(config)

    assert program(arguments, killed) == 130
    assert [trial.state.name for trial in study_in(program.folder / "here").trials] == ["COMPLETE", "RUNNING"]
    stopped = program.runs[-1].tuning.lora.rank
    assert program([*arguments, "sweep.resume=true"], peak) == 0
    assert program.runs[0].tuning.lora.rank == stopped
    assert [trial.state.name for trial in study_in(program.folder / "here").trials] == ["COMPLETE"] * 3
    assert statuses(program.folder / "here").keys() == {"0", "1", "2"}


@pytest.mark.slow
def test_a_job_reports_to_its_trial_and_is_stopped_by_the_median(program: Program) -> None:
    def reporting(config: Config) -> float:
        value = config.seed / 10
        program.trial.report(value, 1)
        if program.trial.should_prune():
            raise TrialPruned("worse than the others", value)
        return value

    arguments = [
        *SEARCH,
        "sweep.sampler=grid",
        "seed=9,8,1",
        "sweep.prune_after_trials=2",
        "sweep.prune_after_epochs=0",
    ]
    assert program(arguments, reporting) == 0, "a pruned trial is no failure"
    found = statuses(program.folder / "here")
    assert [one["status"] for one in found.values()] == ["finished", "finished", "pruned"]
    assert found["2"]["objective"] == 0.1
    assert found["2"]["reason"] == "worse than the others"
    assert [trial.state.name for trial in study_in(program.folder / "here").trials] == [
        "COMPLETE",
        "COMPLETE",
        "PRUNED",
    ]
    assert program.trial is not None
    program(["paths.output_dir=plain"])
    assert program.trial is None, "a run outside of a search has no trial"


def test_a_misspelt_choice_leaves_nothing(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["-m", "sweep=optuna", "encoder=tiny,siglp2"]) == 2
    assert "encoder=siglp2 does not exist" in capsys.readouterr().err
    assert [*program.folder.iterdir()] == []
