"""Runs end early, by a metric or because they have gone wrong, and leave what is needed to understand it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny_training import tiny_data, tiny_training
from vlmcap.compose import compose
from vlmcap.config import Config, GuardConfig, Stage
from vlmcap.errors import DivergedError, TrialPruned, UserError
from vlmcap.training.callbacks.guard import DivergenceGuard
from vlmcap.training.callbacks.saving import checkpoint_callbacks
from vlmcap.training.callbacks.stopping import PatientStop, TrialPruning
from vlmcap.training.module import CaptioningModule
from vlmcap.training.run import train
from vlmcap.training.schedule import StagePlan

MakeConfig = Callable[..., Config]


def metrics(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[name] for row in rows if name in row]


# --- metrics and their better direction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        (["monitor=val/loss"], "min"),
        (["monitor=val/cider"], "max"),
        (["monitor=val/loss", "mode=min"], "min"),
        (["monitor=val/length_ratio", "mode=min"], "min"),
    ],
)
def test_best_follows_a_metric_in_its_own_direction(overrides: list[str], mode: str, tmp_path: Path) -> None:
    callback: Any = checkpoint_callbacks(tmp_path, compose([f"paths.output_dir={tmp_path}", *overrides]))[-1]
    assert (callback.filename, callback.mode) == ("best", mode)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("monitor=val/cidre", r"monitor=val/cidre is not measured while training; .*cider"),
        ("monitor=train/loss", r"train/loss is not measured while training; choose val/"),
        ("monitor=test/cider", r"test/cider is not measured while training; choose val/"),
        ("monitor=val/facts/wether", r"monitor=val/facts/wether is not measured; choose val/facts/ .*weather.*mean"),
    ],
)
def test_what_is_never_measured_is_refused_before_training(
    override: str, expected: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        train(tiny_config(tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


# --- early stopping ---------------------------------------------------------------------------------------------------

WAITING = (
    "callbacks=early_stopping",
    "callbacks.early_stopping.patience=2",
    "tuning.epochs=12",
    "trainer.log_every_n_steps=1",
)


@pytest.mark.slow
def test_an_early_end_counts_in_the_last_stage_alone(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a delta that nothing reaches, the first validation of the last stage stays the best, and two more follow."""
    folder = tmp_path / "run"
    delta = ("monitor=val/meteor", "callbacks.early_stopping.min_delta=1000", "tuning.align_epochs=4")
    train(tiny_config(folder, *WAITING, *delta))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 4 * (4 + 3)
    assert len(metrics(folder, "val/meteor")) == 7 + 1, (
        "a metric that is too slow for the loop is measured there if it is followed"
    )
    assert "Stopped early after epoch 7: val/meteor was not better than" in capsys.readouterr().out
    train(tiny_config(folder, *WAITING, *delta, "checkpoint=last"))
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] == 28, (
        "resumed, it is still at its end"
    )


def test_waiting_goes_on_after_a_resume(tmp_path: Path) -> None:
    plan = StagePlan({"tune": Stage(epochs=9, projector_lr=1.0)})
    settings: dict[str, Any] = {"monitor": "val/loss", "mode": "min", "patience": 3, "min_delta": 0.0}
    first, second = PatientStop(plan, **settings), PatientStop(plan, **settings)
    for value in (2.0, 1.0, 1.5):
        first._evaluate_stopping_criteria(torch.tensor(value))
    path = tmp_path / "state.ckpt"
    torch.save(first.state_dict(), path)
    second.load_state_dict(torch.load(path, weights_only=True))
    assert (second.wait_count, float(second.best_score)) == (1, 1.0)
    assert [second._evaluate_stopping_criteria(torch.tensor(value))[0] for value in (1.2, 1.1)] == [False, True]


def test_a_metric_without_a_value_is_waited_for_as_one_that_is_no_better() -> None:
    stop = PatientStop(
        StagePlan({"a": Stage(epochs=1)}), monitor="val/facts/mean", mode="max", patience=2, min_delta=0.0
    )
    values = (torch.nan, 0.5, torch.nan, torch.nan)
    assert [stop._evaluate_stopping_criteria(torch.tensor(value))[0] for value in values] == [False, False, False, True]


# --- the guard --------------------------------------------------------------------------------------------------------


def spoil(step: int, how: Callable[[torch.Tensor], torch.Tensor], patch: pytest.MonkeyPatch, last: int = 10**6) -> None:
    """Changes the loss of the micro-batches of some steps."""
    original = CaptioningModule.training_step

    def training_step(self: CaptioningModule, batch: Any, batch_idx: int) -> Any:
        if not step <= self.global_step <= last:
            return original(self, batch, batch_idx)
        forward = self.captioner.forward
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.captioner, "forward", lambda given: (how(forward(given)[0]), forward(given)[1]))
            return original(self, batch, batch_idx)

    patch.setattr(CaptioningModule, "training_step", training_step)


class WrongGradient(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * torch.inf


def guarded(folder: Path, config: GuardConfig, *, is_scaled: bool = False, num_epochs: int = 3) -> None:
    guard = DivergenceGuard(config, folder, is_scaled=is_scaled)
    trainer, module = tiny_training(folder, tiny_data(), num_epochs=num_epochs, callbacks=[guard])
    trainer.fit(module, datamodule=tiny_data(), weights_only=True)


@pytest.mark.parametrize("how", [lambda loss: loss * torch.nan, WrongGradient.apply], ids=["loss", "gradient"])
def test_what_is_no_number_stops_the_run_with_its_batch(
    how: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(4, how, monkeypatch)  # after a checkpoint at step 4, of 5 an epoch; the next would be that of step 5
    with pytest.raises(
        DivergedError,
        match=r"stopped at step 5 \(tune, epoch 1\): .*diverged/step-000005\.json, and "
        r"last\.ckpt is from an earlier step",
    ):
        guarded(tmp_path, GuardConfig())
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert all(bool(value.isfinite().all()) for value in last["state_dict"].values())
    content = json.loads((tmp_path / "diverged" / "step-000005.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "diverged" / "step-000005.safetensors")
    assert (content["step"], content["epoch"], content["stage"], content["precision"]) == (5, 1, "tune", "32-true")
    assert "nan" in (content["loss"], content["grad_norm"]) or "inf" in (content["loss"], content["grad_norm"])
    assert content["rates"]["projector"] > 0
    ids = [clip["id"] for batch in content["batches"] for clip in batch["clips"]]
    assert len(ids) == sum(len(tensors[f"batch.{index}.input_ids"]) for index in range(len(content["batches"])))
    assert int((tensors["batch.0.labels"] != -100).sum()) >= content["batches"][0]["label_tokens"] > 0
    torch.set_rng_state(tensors["random.torch"])


def test_a_run_without_the_guard_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(4, lambda loss: loss * torch.nan, monkeypatch)
    trainer, module = tiny_training(tmp_path, tiny_data(), num_epochs=2)
    trainer.fit(module, datamodule=tiny_data(), weights_only=True)
    assert trainer.global_step == 10


def test_float16_may_skip_some_steps_and_not_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        monkeypatch.context() as patch
    ):  # the weights are NaN afterwards, as no scaler skips the step here: only counting is tested
        spoil(4, WrongGradient.apply, patch)
        with pytest.raises(
            DivergedError, match=r"stopped at step 8 .*the gradients of 4 steps in a row overflow in float16.*bfloat16"
        ):
            guarded(tmp_path, GuardConfig(fp16_skips=4), is_scaled=True)
    guard = DivergenceGuard(GuardConfig(fp16_skips=2), tmp_path, is_scaled=True)
    trainer, module = tiny_training(tmp_path / "skipped", tiny_data(), num_epochs=2, callbacks=[guard])
    monkeypatch.setattr(module, "configure_gradient_clipping", lambda *_, **__: alternate(module))
    trainer.fit(module, datamodule=tiny_data(), weights_only=True)
    assert trainer.global_step == 10


def alternate(module: CaptioningModule) -> None:
    """Each second norm overflows."""
    module.grad_norm = torch.tensor(torch.inf if module.global_step % 2 else 1.0)


def test_a_loss_that_ran_off_and_stays_there_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(20, lambda loss: loss * 5, monkeypatch)
    with pytest.raises(
        DivergedError, match=r"stopped at step 26 .*the loss, .*, has been far above its best, .*, for 6 steps"
    ):
        guarded(tmp_path, GuardConfig(factor=3.0, window=6), num_epochs=6)


def test_a_loss_that_comes_back_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(15, lambda loss: loss * 5, monkeypatch, last=19)
    guarded(tmp_path, GuardConfig(factor=3.0, window=6), num_epochs=6)


def test_the_program_says_what_went_wrong_and_fails(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(2, lambda loss: loss * torch.nan, monkeypatch)
    with pytest.raises(UserError, match="stopped at step 3"):
        train(tiny_config(tmp_path / "run", "trainer.max_steps=4"))
    assert (tmp_path / "run" / "diverged" / "step-000003.json").is_file()


# --- a search


class Worse:
    """A trial that is always worse than the others."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, int]] = []

    def report(self, value: float, step: int) -> None:
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return True


def validate(trial: Worse, epoch: int, scores: dict[str, float]) -> None:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
    trainer: Any = SimpleNamespace(
        sanity_checking=False,
        current_epoch=epoch,
        is_global_zero=True,
        max_epochs=3,
        strategy=strategy,
        callback_metrics=metrics,
    )
    TrialPruning("val/cider", trial).on_validation_epoch_end(trainer, None)  # type: ignore[arg-type]


def test_a_worse_run_ends_before_its_last_epoch_alone() -> None:
    trial = Worse()
    with pytest.raises(TrialPruned, match=r"val/cider of 0\.5000 after epoch 2 is worse than the median"):
        validate(trial, 1, {"val/cider": 0.5})
    validate(trial, 2, {"val/cider": 0.6})
    assert trial.reports == [(0.5, 2), (0.6, 3)]


@pytest.mark.parametrize("scores", [{}, {"val/cider": float("nan")}, {"val/loss": 1.0}])
def test_what_is_not_measured_ends_nothing(scores: dict[str, float]) -> None:
    trial = Worse()
    validate(trial, 0, scores)
    assert not trial.reports
