"""What chooses and stops by a metric also works where the metric has no value, or is refused beforehand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.training.callbacks.choosing import Choice, Score
from vlmcap.training.checks import check_monitored_clips
from vlmcap.training.run import train
from vlmcap.types import Clip

MakeConfig = Callable[..., Config]
NAN = math.nan


def best_epoch(ciders: Sequence[float | None], losses: Sequence[float | None], mode: str = "max") -> int:
    """The epoch that is kept; None stands for a metric that was not measured."""
    choice, best = Choice("best.ckpt", "val/cider", mode), None
    for epoch, (cider, loss) in enumerate(zip(ciders, losses, strict=True)):
        named = {"val/cider": cider, "val/loss": loss}
        score = Score(epoch, epoch, "val/cider", {name: value for name, value in named.items() if value is not None})
        if choice.is_better(score, best):
            best = score
    assert best is not None
    return best.epoch


@pytest.mark.parametrize(
    ("ciders", "losses", "expected"),
    [
        ([0.1, 0.3, 0.2], [1.0, 9.0, 1.0], 1),
        ([0.3, 0.3, 0.3], [3.0, 2.0, 1.0], 0),
        ([NAN, NAN, NAN], [7.0, 5.0, 6.0], 1),
        ([None, None, None], [7.0, 5.0, 6.0], 1),
        ([math.inf, -math.inf, NAN], [7.0, 6.0, 5.0], 2),
        ([0.0, NAN, NAN], [7.0, 5.0, 6.0], 1),
        ([NAN, 0.1, 0.2], [7.0, 5.0, 6.0], 2),
        ([NAN, NAN, NAN], [NAN, 5.0, NAN], 1),
        ([NAN, 0.1, NAN], [NAN, NAN, NAN], 1),
        ([NAN, NAN], [NAN, NAN], 0),
    ],
)
def test_the_best_validation_is_by_the_metric_or_else_by_the_loss(
    ciders: Sequence[float | None], losses: Sequence[float | None], expected: int
) -> None:
    assert best_epoch(ciders, losses) == expected


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_with_values_the_choice_is_the_first_best_one(values: list[float]) -> None:
    assert best_epoch(values, [1.0] * len(values)) == values.index(max(values))
    assert best_epoch(values, [1.0] * len(values), "min") == values.index(min(values))
    assert best_epoch([NAN] * len(values), values) == values.index(min(values))


def test_a_metric_without_a_value_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    best_epoch([0.1, NAN, NAN], [3.0, 2.0, 1.0])
    said = capsys.readouterr().out
    assert said == "Warning: val/cider has no value after epoch 2; best.ckpt follows val/loss instead.\n"


def test_another_metric_is_read_from_the_record_of_the_best() -> None:
    best = Score(3, 30, "val/loss", {"val/loss": 1.0, "val/cider": 0.5})
    choice = Choice("best.ckpt", "val/cider", "max")
    assert not choice.is_better(Score(4, 40, "val/cider", {"val/loss": 0.1, "val/cider": 0.4}), best)
    assert choice.is_better(Score(4, 40, "val/cider", {"val/loss": 9.0, "val/cider": 0.6}), best)


# --- before anything is trained


def clips(**sizes: int) -> dict[str, list[Clip]]:
    return {split: [Clip(str(index), "a.mp4", ("a",)) for index in range(size)] for split, size in sizes.items()}


@pytest.mark.parametrize(
    ("overrides", "sizes", "expected"),
    [
        (
            (),
            {"train": 9, "val": 1},
            r"monitor=val/cider compares clips .*validation uses 1 clip; .*set monitor=val/loss$",
        ),
        (("evaluation.max_clips=1",), {"train": 9, "val": 9}, r"monitor=val/cider .*evaluation\.max_clips is 1"),
        (("monitor=val/cider_d",), {"train": 9, "val": 1}, r"monitor=val/cider_d "),
    ],
)
def test_a_metric_that_cannot_have_a_value_is_refused(
    overrides: Sequence[str], sizes: dict[str, int], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        check_monitored_clips(compose(["monitor=val/cider", *overrides]), clips(**sizes))


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (("monitor=val/loss",), {"train": 9, "val": 1}),
        ((), {"train": 9, "val": 2}),
        (("monitor=val/rouge_l",), {"train": 9, "val": 1}),
    ],
    ids=["loss", "two clips", "a metric of one clip"],
)
def test_a_metric_that_can_have_one_is_not(overrides: Sequence[str], sizes: dict[str, int]) -> None:
    check_monitored_clips(compose(["monitor=val/cider", *overrides]), clips(**sizes))


def test_the_program_refuses_cider_of_one_clip(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor=val/cider compares clips"):
        train(tiny_config(tmp_path / "run", "evaluation.max_clips=1"))
    assert not (tmp_path / "run").exists()


def test_every_order_of_validations_ends_with_one_that_has_a_value() -> None:
    for order in itertools.permutations([(NAN, NAN), (0.5, NAN), (NAN, NAN)]):
        assert not math.isnan(order[best_epoch([cider for cider, _ in order], [loss for _, loss in order])][0])
