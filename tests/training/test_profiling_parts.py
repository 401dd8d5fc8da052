"""The parts of a profile: its profiler, the timing of reads, its picture."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from vlmcap.config import ProfileConfig
from vlmcap.training.profiling.callback import StepProfile, read_seconds
from vlmcap.training.profiling.profiler import EVALUATION, PLAIN, TIMED, PhaseProfiler
from vlmcap.training.profiling.report import LABELS, StepTimes, draw_times
from vlmcap.types import Clip


class Hands:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


OPTIMIZER_STEP, TRAINING_STEP = (
    "[LightningModule]CaptioningModule.optimizer_step",
    "[Strategy]DDPStrategy.training_step",
)


def test_the_innermost_part_has_the_time_and_the_parts_add_up() -> None:
    hands = Hands()
    profiler = PhaseProfiler(lambda: None, hands)
    hands.now = 200
    profiler.start("language")
    profiler.begin(TIMED)
    for call, name, seconds in (
        (profiler.start, OPTIMIZER_STEP, 1),  # 1 in no part
        (profiler.start, TRAINING_STEP, 2),  # 2 in the optimiser
        (profiler.start, "language", 4),  # 4 in no part
        (profiler.start, "loss", 8),  # 8 in the language model
        (profiler.stop, "loss", 16),  # 16 in the head
        (
            profiler.start,
            "[Callback]Any.on_before_backward",
            32,
        ),  # 32 in the language model, and Lightning's other actions are no parts
        (profiler.stop, "language", 64),
        (profiler.start, "loss", 128),  # 128 in no part
        (profiler.stop, TRAINING_STEP, 256),  # 256 in the loss, which ends with the training step
        (profiler.stop, OPTIMIZER_STEP, 512),
    ):
        hands.now += seconds
        call(name)
    hands.now += 1024
    profiler.end()
    hands.now += 5000
    profiler.stop("language")
    expected = {"other": 1 + 4 + 128 + 1024, "optimiser": 2 + 512, "language": 8 + 32 + 64, "loss": 16 + 256}
    assert dict(profiler.seconds[TIMED]) == expected
    assert profiler.wall[TIMED] == sum(expected.values()) == 2047


def test_the_end_of_a_section_forgets_what_was_open_and_nothing_counts_outside() -> None:
    hands = Hands()
    fetches: list[float] = []
    profiler = PhaseProfiler(lambda: fetches.append(hands.now), hands)
    profiler.begin(TIMED)
    profiler.start("[_TrainingEpochLoop].train_dataloader_next")
    hands.now += 1
    profiler.end()
    profiler.end()
    hands.now += 50
    profiler.begin(TIMED)
    hands.now += 2
    profiler.begin(EVALUATION)
    profiler.start("language")
    hands.now += 4
    profiler.start("captions")
    hands.now += 8
    profiler.begin(PLAIN)
    profiler.start("language")
    hands.now += 16
    profiler.end()
    assert (dict(profiler.seconds[TIMED]), profiler.wall[TIMED]) == ({"wait": 1, "other": 2}, 3)
    assert (dict(profiler.seconds[EVALUATION]), profiler.wall[EVALUATION]) == ({"rest": 4, "captions": 8}, 12)
    assert (dict(profiler.seconds[PLAIN]), profiler.wall[PLAIN]) == ({"other": 16}, 16)
    assert fetches == [100]


class Slow(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_is_timed_wherever_it_happens(workers: int, tmp_path: Path) -> None:
    clips = [Clip("a", "a.mp4", ("말",))]
    profile = StepProfile(ProfileConfig(), tmp_path)
    make = profile.watching(lambda _: Slow(), clips)  # type: ignore[arg-type, return-value]
    assert sorted(int(item) for item in DataLoader(make(clips), num_workers=workers)) == list(range(8))  # type: ignore[call-overload]
    totals = profile.read_totals.sum(dim=0)
    assert totals[1] == 8
    assert 0.02 <= read_seconds(torch.zeros(2), totals) < 0.2
    assert 0.02 <= read_seconds(totals, totals) < 0.2, "the mean until then, as nothing was read since"
    assert isinstance(make(list(clips)), Slow), "clips of another split are not timed"


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    parts = {name: 0.1 for name in LABELS}
    times = StepTimes("cpu", 5, 20, 32, 0, False, 1.0, parts, None, {}, None, None)
    draw_times(times, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["steps.png"]
