"""`sweep=halving`: few clips for all, all clips for the best."""

from __future__ import annotations

import json

import pytest

from tests.sweeping.program import Program
from vlmcap.config import Config
from vlmcap.sweeping.halving import round_sizes

HALVING = ["-m", "sweep=halving", "sweep.folder=here", "data.demo.num_train=64"]


def by_rate(config: Config) -> float:
    """The higher the seed the better, but for the one that breaks."""
    if config.seed == 3:
        raise RuntimeError("diverged")
    return config.seed / 10


@pytest.mark.slow
def test_the_better_half_goes_on_with_more(program: Program) -> None:
    assert program([*HALVING, "seed=0,1,2,3"], by_rate) == 1
    sizes = [(config.seed, config.data.max_clips, config.tuning.stages["tune"].epochs) for config in program.runs]
    assert sizes == [(0, 32, 9), (1, 32, 9), (2, 32, 9), (3, 32, 9), (1, 46, 13), (2, 46, 13), (2, None, 18)]
    record = json.loads((program.folder / "here" / "halving.json").read_text(encoding="utf-8"))
    assert [one["share"] for one in record["rounds"]] == [0.25, 0.5, 1.0]
    assert [[job["is_kept"] for job in one["jobs"]] for one in record["rounds"]] == [
        [False, True, True, False],
        [False, True],
        [True],
    ]
    assert record["rounds"][0]["jobs"][3]["status"] == "failed"
    program([*HALVING, "seed=0,1,2", "sweep.resume=true", "sweep.keep=0.67"], by_rate)
    assert record != json.loads((program.folder / "here" / "halving.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_resumed_halving_runs_what_is_left(program: Program) -> None:
    def stopped(config: Config) -> float:
        if config.data.max_clips is None:
            raise KeyboardInterrupt
        return config.seed / 10

    assert program([*HALVING, "seed=0,1", "sweep.scaled=clips"], stopped) == 130
    assert program([*HALVING, "seed=0,1", "sweep.scaled=clips", "sweep.resume=true"], by_rate) == 0
    assert [(config.seed, config.data.max_clips) for config in program.runs] == [(1, None)]


def test_without_a_number_of_clips_there_are_no_shares(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["-m", "sweep=halving", "data=jsonl", "data.root=here", "seed=0,1"]) == 2
    assert "sweep=halving needs data.max_clips" in capsys.readouterr().err
    assert [*program.folder.iterdir()] == []


def test_rounds() -> None:
    assert round_sizes(8, 0.5) == [8, 4, 2, 1]
    assert round_sizes(9, 0.34) == [9, 3, 1]
    assert round_sizes(2, 0.9) == [2, 1]
    assert round_sizes(1, 0.5) == [1]
