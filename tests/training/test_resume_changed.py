"""A run resumed with other batches, accumulation or epochs continues its schedule to the end, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.training.test_kill_points import Points, differences
from tests.training.test_kill_points import fit as fit_script
from tests.training.tiny_training import tiny_clips, tiny_data, tiny_training
from vlmcap.compose import compose
from vlmcap.config import Stage
from vlmcap.errors import UserError
from vlmcap.training.callbacks.progress import RunProgress
from vlmcap.training.checks import check_resume_position
from vlmcap.training.module import CaptioningModule
from vlmcap.training.schedule import StagePlan


class DiedError(Exception):
    """Stands for a process that dies."""


class Rates(L.Callback):
    """Notes epoch, projector rate and language model rate of each optimiser step, and may die in a validation."""

    def __init__(self, *, dies_in_epoch: int = -1) -> None:
        self.dies_in_epoch, self.steps = dies_in_epoch, list[tuple[int, float, float]]()
        self.validated: list[int] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        rates = {group["component"]: group["lr"] for group in optimizer.param_groups}
        self.steps.append((trainer.current_epoch, rates["projector"], rates["llm"]))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(trainer.current_epoch)
        if trainer.current_epoch == self.dies_in_epoch:
            raise DiedError


def stages(align: int, tune: int) -> dict[str, Stage]:
    return {
        "align": Stage(epochs=align, projector_lr=0.02, warmup_ratio=0.2),
        "tune": Stage(epochs=tune, projector_lr=0.004, llm_lr=0.01, warmup_ratio=0.1),
    }


def fit(
    folder: Path, align: int, tune: int, rates: Rates, *, accumulate: int = 2, clips: int = 26, **settings: Any
) -> CaptioningModule:
    last = folder / "checkpoints" / "last.ckpt"
    data = tiny_data(tiny_clips(clips), **settings)
    plan, callbacks = stages(align, tune), [rates, RunProgress(2)]
    trainer, module = tiny_training(
        folder,
        data,
        num_epochs=align + tune,
        stages=plan,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        monitor="val/loss",
    )
    trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)
    return module


def expected(align: int, tune: int, first_epoch: int, steps_per_epoch: int) -> list[tuple[int, float, float]]:
    """Rates of a straight run of such steps, from an epoch on."""
    plan = StagePlan(stages(align, tune))
    steps = range(first_epoch * steps_per_epoch, (align + tune) * steps_per_epoch)
    return [
        (step // steps_per_epoch, *(plan.rate(part, step, steps_per_epoch) for part in ("projector", "llm")))
        for step in steps
    ]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch each; nine batches, five steps."""
    folder = tmp_path_factory.mktemp("first") / "run"
    rates = Rates()
    fit(folder, 1, 1, rates)
    assert rates.steps == expected(1, 1, 0, 5)
    return folder


@pytest.mark.parametrize(
    ("change", "steps_per_epoch"),
    [
        ({}, 5),
        ({"batch_size": 13}, 1),
        ({"batch_size": 26}, 1),
        ({"batch_size": 1}, 13),
        ({"accumulate": 1}, 9),
        ({"accumulate": 9}, 1),
        ({"clips": 12}, 2),
        ({"clips": 50}, 9),
    ],
)
def test_rates_go_on_from_an_epoch_with_other_steps(
    change: dict[str, int], steps_per_epoch: int, first: Path, tmp_path: Path
) -> None:
    shutil.copytree(first, tmp_path / "run")
    rates = Rates()
    module = fit(tmp_path / "run", 1, 3, rates, **change)
    assert rates.steps == expected(1, 3, 2, steps_per_epoch)
    assert min(llm for _, _, llm in rates.steps) > 0
    assert rates.validated == [2, 3]
    assert module.rates.steps_left == 0


@pytest.mark.parametrize(
    ("change", "steps_per_epoch"), [({}, 5), ({"batch_size": 13}, 1), ({"accumulate": 1}, 9), ({"batch_size": 1}, 13)]
)
def test_a_validation_that_is_owed_comes_first(change: dict[str, int], steps_per_epoch: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DiedError):  # step 10 of the second epoch is saved, as each second one
        fit(folder, 1, 2, Rates(dies_in_epoch=1))
    rates = Rates()
    fit(folder, 1, 2, rates, **change)
    assert rates.validated == [1, 2]
    assert rates.steps == expected(1, 2, 2, steps_per_epoch)


def test_a_validation_that_is_no_longer_due_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(DiedError):
        fit(tmp_path, 1, 2, Rates(dies_in_epoch=1))
    rates, data = Rates(), tiny_data(tiny_clips(26))
    trainer, module = tiny_training(
        tmp_path, data, num_epochs=3, stages=stages(1, 2), callbacks=[rates], check_val_every_n_epoch=3
    )
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (rates.validated, rates.steps) == ([2], expected(1, 2, 2, 5))


# --- what cannot go on


def held(stage_names: list[str], epoch: int, batches: int = 0, accumulate: int = 2) -> dict[str, Any]:
    return {"position": {"epoch": epoch, "batches": batches}, "plan": {"stages": stage_names, "accumulate": accumulate}}


def check(held: dict[str, Any], align: int, tune: int, accumulate: int = 2) -> None:
    numbers = (
        f"tuning.align_epochs={align}",
        f"tuning.epochs={align + tune}",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    check_resume_position(held, compose(["tuning=two_stage", *numbers]))


@pytest.mark.parametrize(
    ("state", "align", "tune", "accumulate"),
    [
        (held(["align", "tune"], 2), 1, 3, 2),
        (held(["align", "tune"], 2), 1, 1, 8),
        (held(["align", "align", "tune"], 2), 4, 1, 2),
        (held(["align", "tune", "tune"], 2, batches=1), 1, 5, 2),
        (held(["align", "tune", "tune"], 2), 1, 1, 2),
        (held(["align", "tune"], 0), 0, 1, 2),
    ],
    ids=[
        "longer",
        "accumulation after an epoch",
        "longer first stage",
        "longer, inside an epoch",
        "no more",
        "nothing trained",
    ],
)
def test_what_can_go_on_is_not_refused(state: dict[str, Any], align: int, tune: int, accumulate: int) -> None:
    check(state, align, tune, accumulate)


@pytest.mark.parametrize(
    ("state", "align", "tune", "accumulate", "expected"),
    [
        (
            held(["align", "tune"], 1, batches=2),
            1,
            1,
            3,
            r"inside an epoch with trainer\.accumulate_grad_batches=2, which cannot continue with 3;",
        ),
        (
            held(["align", "tune", "tune"], 2),
            3,
            1,
            2,
            r"has trained epochs align: 1, tune: 1, but .* begins with epochs align: 2",
        ),
        (held(["align", "tune", "tune"], 2), 0, 4, 2, r"begins with epochs tune: 2"),
        (
            held(["align", "tune", "tune"], 3),
            1,
            1,
            2,
            r"trained epochs align: 1, tune: 2, but .* epochs align: 1, tune: 1; keep",
        ),
        (held(["align", "tune", "tune"], 1, batches=2), 2, 1, 2, r"has trained epochs align: 1, tune: 1"),
    ],
    ids=[
        "accumulation inside an epoch",
        "longer first stage",
        "no first stage",
        "fewer epochs",
        "another stage inside an epoch",
    ],
)
def test_what_cannot_go_on_is_refused(
    state: dict[str, Any], align: int, tune: int, accumulate: int, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        check(state, align, tune, accumulate)


# --- checkpoints beside and behind the one that a run resumes from


def test_a_run_that_goes_on_in_another_folder_takes_its_best_checkpoint_along(tmp_path: Path) -> None:
    fit_script(tmp_path / "straight", "middle", Points())
    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "straight" / "checkpoints", tmp_path / "old" / "checkpoints")
    data = tiny_data()
    trainer, module = tiny_training(tmp_path / "moved", data, num_epochs=4, monitor="val/loss")
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "old" / "checkpoints" / "last.ckpt", weights_only=True)
    mine, other = ((tmp_path / name / "checkpoints" / "best.ckpt").read_bytes() for name in ("moved", "straight"))
    assert mine == other


def test_checkpoints_of_an_earlier_run_are_not_those_of_a_fresh_one(tmp_path: Path) -> None:
    """A fresh run in a used folder that dies before its first validation must not resume the other best checkpoint."""
    from tests.training.test_kill_points import KilledError

    fit_script(tmp_path / "straight", "last", Points())
    shutil.copytree(tmp_path / "straight" / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(KilledError):
        fit_script(tmp_path / "run", "last", Points(12))
    fit_script(tmp_path / "run", "last", Points())
    assert differences(tmp_path / "run", tmp_path / "straight") == []
