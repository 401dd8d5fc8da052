"""Lines within an epoch where there is no bar, by a clock."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from vlmcap.config import Stage
from vlmcap.training.callbacks.progress import RunProgress
from vlmcap.training.module import CaptioningModule
from vlmcap.training.schedule import StagePlan

NUM_STEPS = 900


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def trainer_of(**values: Any) -> Any:
    defaults = {
        "progress_bar_callback": None,
        "is_global_zero": True,
        "global_step": 0,
        "current_epoch": 1,
        "num_training_batches": 300,
        "loggers": [],
        "num_val_batches": [3],
        "num_test_batches": [7],
        "check_val_every_n_epoch": 1,
        "callback_metrics": {},
    }
    return SimpleNamespace(**defaults | values)


class Module(CaptioningModule):
    """A module of two stages whose log has fixed values."""

    plan = StagePlan({"align": Stage(epochs=1), "tune": Stage(epochs=2)})
    steps_per_epoch = 300  # type: ignore[assignment]

    rates = SimpleNamespace(steps_left=NUM_STEPS)  # type: ignore[assignment]

    def __init__(self) -> None:
        """Without a model."""

    def take_log(self) -> dict[str, float]:
        return {"train/loss": 1.25, "train/tokens_per_s": 3200.0, "train/lr_adapters": 1e-4}

    def read_log(self) -> dict[str, float]:
        return {"train/loss": 2.5, "train/tokens_per_s": 40.0, "train/lr_adapters": 1e-5}

    def log_dict(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def module() -> CaptioningModule:
    return Module()


def train(progress: RunProgress, clock: Clock, trainer: Any, module: Any, seconds: int) -> None:
    """A step each second."""
    trainer.lightning_module = module
    for _ in range(seconds):
        clock.now += 1
        trainer.global_step += 1
        module.rates.steps_left = NUM_STEPS - trainer.global_step
        progress.on_train_batch_end(
            trainer, module, None, None, (trainer.global_step - 1) % trainer.num_training_batches
        )


def test_lines_by_time_within_an_epoch(module: CaptioningModule, capsys: pytest.CaptureFixture[str]) -> None:
    clock, trainer = Clock(), trainer_of()
    progress = RunProgress(10, clock=clock)
    progress.on_train_start(trainer, module)
    train(progress, clock, trainer, module, 29)
    assert capsys.readouterr().out == ""
    train(progress, clock, trainer, module, 61)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("tune 1/2  step 30 of 900  loss 1.250  lr 0.0001  tok/s 3,200  ") and second.startswith(
        "tune 1/2  step 90 of"
    )
    assert first.endswith((" left", "done"))


def test_a_line_before_the_first_log_step_has_the_values_so_far(
    module: CaptioningModule, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, trainer = Clock(), trainer_of()
    progress = RunProgress(500, clock=clock)
    progress.on_train_start(trainer, module)
    train(progress, clock, trainer, module, 30)
    assert capsys.readouterr().out.startswith("tune 1/2  step 30 of 900  loss 2.500  lr 1e-05  tok/s 40  ")


def test_an_epoch_line_postpones_the_next(module: CaptioningModule, capsys: pytest.CaptureFixture[str]) -> None:
    clock, trainer = Clock(), trainer_of()
    progress = RunProgress(10, clock=clock)
    progress.on_train_start(trainer, module)
    for _ in range(5):  # epochs of 25 s
        train(progress, clock, trainer, module, 25)
        progress.on_train_epoch_end(trainer, module)
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["loss 1.250"] * 5


@pytest.mark.parametrize("quiet", [{"progress_bar_callback": object()}, {"is_global_zero": False}])
def test_no_lines_beside_a_bar_and_from_other_processes(
    quiet: dict[str, Any], module: CaptioningModule, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, trainer = Clock(), trainer_of(**quiet)
    progress = RunProgress(10, clock=clock)
    progress.on_train_start(trainer, module)
    train(progress, clock, trainer, module, 100)
    assert capsys.readouterr().out == ""


def test_validation_and_captioning_have_lines_too(module: CaptioningModule, capsys: pytest.CaptureFixture[str]) -> None:
    clock, trainer = Clock(), trainer_of()
    progress = RunProgress(10, clock=clock)
    progress.on_train_start(trainer, module)
    for batch in range(3):
        clock.now += 20
        progress.on_validation_batch_end(trainer, module, None, None, batch)
    clock.now += 45
    progress.on_test_start(trainer, module)
    progress.on_test_batch_end(trainer, module, None, None, 0)
    clock.now += 32
    progress.on_test_batch_end(trainer, module, None, None, 1)
    assert capsys.readouterr().out.splitlines() == [
        "validation, batches: 2 of 3, 20 s so far, 20 s left",
        "captioning, batches: 2 of 7, 32 s so far, 2.7 min left",
    ]


def test_an_epoch_line_stands_above_the_bar(module: CaptioningModule, capsys: pytest.CaptureFixture[str]) -> None:
    clock, trainer = Clock(), trainer_of(progress_bar_callback=object())
    progress = RunProgress(10, clock=clock)
    progress.on_train_start(trainer, module)
    train(progress, clock, trainer, module, 20)
    with Tqdm(total=20, file=sys.stdout, leave=False) as bar:
        bar.update(20)
        progress.on_train_epoch_end(trainer, module)
        shown = capsys.readouterr().out
    (line,) = [text for text in shown.split("\n") if "loss 1.250" in text]
    assert line.split("\r")[-1].startswith("tune 1/2  loss 1.250"), "a line of its own, once"
