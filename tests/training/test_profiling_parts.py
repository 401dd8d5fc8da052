"""The parts of a profile: its clock, the timing of reads, its picture."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from vlmcap.training.profiling.clock import PartClock, ReadTimes
from vlmcap.training.profiling.report import LABELS, StepTimes, draw_times


class Hands:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_innermost_part_has_the_time_and_the_parts_add_up() -> None:
    hands = Hands()
    clock = PartClock(hands)
    hands.now = 200
    clock.enter("before it runs")
    clock.resume()
    for call, seconds in (
        (lambda: clock.enter("optimiser"), 1),  # 1 in no part
        (lambda: clock.enter("language"), 2),  # 2 in the optimiser
        (lambda: clock.enter("loss"), 4),  # 4 in the language model
        (clock.leave, 8),  # 8 in the head
        (lambda: clock.turn("loss"), 16),  # 16 in the language model, what follows in the loss
        (clock.leave, 32),
        (clock.leave, 64),  # 64 in the optimiser
        (clock.pause, 128),
    ):
        hands.now += seconds
        call()
    hands.now += 1000
    clock.leave()
    assert dict(clock.seconds) == {"other": 1 + 128, "optimiser": 2 + 64, "language": 4 + 16, "loss": 8 + 32}
    assert clock.wall == sum(clock.seconds.values()) == 255


def test_a_pause_forgets_what_was_open_and_counts_for_nothing() -> None:
    hands = Hands()
    clock = PartClock(hands)
    clock.resume()
    clock.enter("wait")
    hands.now += 1
    clock.pause()
    clock.pause()
    hands.now += 50
    clock.resume()
    clock.resume()
    hands.now += 2
    clock.pause()
    assert (dict(clock.seconds), clock.wall) == ({"wait": 1, "other": 2}, 3)


class Slow(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_is_timed_wherever_it_happens(workers: int) -> None:
    times = ReadTimes()
    times.begin()
    assert sorted(int(item) for item in DataLoader(times.over(Slow()), num_workers=workers)) == list(range(8))
    times.end()
    assert 0.02 <= times.seconds_a_clip < 0.2
    times.begin()
    times.end()
    assert 0.02 <= times.seconds_a_clip < 0.2, "the mean until then, as nothing was read since"


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    parts = {name: 0.1 for name in LABELS}
    times = StepTimes("cpu", 5, 20, 32, 0, False, 1.0, parts, None, {}, None, None)
    draw_times(times, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["steps.png"]
