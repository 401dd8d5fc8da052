"""Wherever a run dies or is stopped, what is left after a resume are the files of a run that went straight through."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.training.tiny_training import tiny_data, tiny_training
from vlmcap.config import Config, GuardConfig
from vlmcap.errors import StoppedBySignal
from vlmcap.training.callbacks.evaluation import log_scores
from vlmcap.training.callbacks.guard import DivergenceGuard
from vlmcap.training.callbacks.progress import RunProgress
from vlmcap.training.callbacks.requeue import StopOnSignal
from vlmcap.training.callbacks.saving import AtomicCheckpointIO
from vlmcap.training.callbacks.stopping import PatientStop
from vlmcap.training.loggers.jsonl import JsonlLogger
from vlmcap.training.module import CaptioningModule
from vlmcap.training.run import train
from vlmcap.training.schedule import StagePlan

NUM_EPOCHS = 4
# The best epoch is in the middle, the first, the last, or by the loss; the third script stops early in two of its
# places.
SCRIPTS: dict[str, tuple[str, list[float], list[float]]] = {
    "middle": ("val/loss", [7.0, 5.0, 6.0, 5.5], [0.0] * 4),
    "last": ("val/cider", [7.0, 7.0, 7.0, 7.0], [0.1, 0.3, 0.2, 0.4]),
    "stopped early": ("val/loss", [5.0, 7.0, 6.0, 4.0], [0.0] * 4),
    "without a value": ("val/cider", [7.0, 5.0, 6.0, 5.5], [math.nan] * 4),
}


class KilledError(BaseException):
    """Stands for the death of the process."""


class Points:
    """Counts the places where a process may die, and dies in one of them."""

    def __init__(self, kill: int = -1, how: Callable[[], None] | None = None) -> None:
        self.kill, self.how, self.names = kill, how or die, list[str]()

    def reach(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self.kill:
            self.how()


def die() -> None:
    raise KilledError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Scripted(L.Callback):
    """Validations that find what a script says, between two places to die."""

    def __init__(self, points: Points, losses: Sequence[float], ciders: Sequence[float]) -> None:
        self.points, self.losses, self.ciders = points, losses, ciders

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.points.reach("validation batch")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.points.reach("before the scores")
        epoch = trainer.current_epoch
        log_scores(trainer, pl_module, {"val/loss": self.losses[epoch], "val/cider": self.ciders[epoch]})
        self.points.reach("after the scores")


class Places(L.Callback):
    """Other places to die, behind all callbacks but those that save."""

    def __init__(self, points: Points) -> None:
        self.points = points

    def on_train_batch_start(self, *args: Any) -> None:
        self.points.reach("micro-batch")

    def on_train_batch_end(self, *args: Any) -> None:
        self.points.reach("end of a micro-batch")

    def on_validation_end(self, *args: Any) -> None:
        self.points.reach("end of validation")

    def on_train_epoch_end(self, *args: Any) -> None:
        self.points.reach("end of an epoch")


class DyingIO(AtomicCheckpointIO):
    """Dies before, in the middle of and after the writing of a checkpoint."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = points

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        name = Path(path).stem
        self.points.reach(f"before {name}")
        with pytest.MonkeyPatch.context() as patch:
            save = torch.save

            def save_half(content: object, target: Path) -> None:
                target.write_bytes(b"half")
                self.points.reach(f"half of {name}")
                save(content, target)

            patch.setattr(torch, "save", save_half)
            super().save_checkpoint(checkpoint, path, storage_options)
        self.points.reach(f"after {name}")


def fit(folder: Path, script: str, points: Points) -> None:
    """Trains to the end from the last checkpoint, if there is one, as `train` does."""
    monitor, losses, ciders = SCRIPTS[script]
    folder.mkdir(exist_ok=True)
    last = folder / "checkpoints" / "last.ckpt"
    resumed = last if last.is_file() else None
    logger = JsonlLogger(folder / "metrics.jsonl")
    logger.drop_after(-1 if resumed is None else int(torch.load(last, weights_only=True)["global_step"]))
    stop = StopOnSignal(folder)
    data = tiny_data()
    trainer, module = tiny_training(
        folder, data, num_epochs=NUM_EPOCHS, monitor=monitor, logger=logger, plugins=[DyingIO(points)]
    )
    mode = "min" if monitor == "val/loss" else "max"
    patient = PatientStop(StagePlan(module.plan.stages), monitor=monitor, mode=mode, patience=2, min_delta=0.0)
    callbacks = [
        Scripted(points, losses, ciders),
        RunProgress(2),
        patient,
        DivergenceGuard(GuardConfig(), folder, is_scaled=False),
    ]
    trainer.callbacks[:0] = [*callbacks, stop, Places(points)]  # type: ignore[attr-defined]
    with stop.listening():
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)


def same(mine: Any, other: Any) -> bool:
    """Equality of plain data and tensors, to the bit, NaN included."""
    if isinstance(mine, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(torch.nan_to_num(mine), torch.nan_to_num(other))
    if isinstance(mine, dict):
        return (
            isinstance(other, dict) and mine.keys() == other.keys() and all(same(mine[key], other[key]) for key in mine)
        )
    if isinstance(mine, list | tuple):
        return len(mine) == len(other) and all(map(same, mine, other))
    return bool(mine == other or (mine != mine and other != other))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without speeds."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if "per_s" not in name} for line in lines]


def differences(folder: Path, straight: Path) -> list[str]:
    """What differs between two run folders; the counts inside Lightning's loops may."""
    found = [] if same(rows(folder), rows(straight)) else ["metrics.jsonl"]
    for name in ("last", "best"):
        mine, other = (
            torch.load(one / "checkpoints" / f"{name}.ckpt", weights_only=True) for one in (folder, straight)
        )
        found += [f"{name}: {key}" for key in other if key != "loops" and not same(mine[key], other[key])]
    return found


@pytest.fixture(scope="module")
def straight_fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Script to the folder of a run that went straight through, and the places that it passed."""
    found = {}
    for index, script in enumerate(SCRIPTS):
        folder, points = tmp_path_factory.mktemp("straight") / str(index), Points()
        fit(folder, script, points)
        found[script] = folder, points.names
    return found


def kills(
    script: str, names: Sequence[str], how: Callable[[], None], share: int, folder: Path, straight: Path
) -> Iterator[str]:
    """Kills a run at each `share`-th place and resumes it; yields what differs then."""
    for point in range(share // 2, len(names), share):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            fit(folder, script, Points(point, how))
        except (KilledError, StoppedBySignal):
            fit(folder, script, Points())
        yield from (f"{point} ({names[point]}): {what}" for what in differences(folder, straight))


def test_the_scripts_are_what_they_say(straight_fits: dict[str, tuple[Path, list[str]]]) -> None:
    best = {
        script: torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
        for script, (folder, _) in straight_fits.items()
    }
    assert {script: content["epoch"] for script, content in best.items()} == {
        "middle": 1,
        "last": 3,
        "stopped early": 0,
        "without a value": 1,
    }
    assert torch.load(straight_fits["stopped early"][0] / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2
    assert sum(len(names) for _, names in straight_fits.values()) > 200


@pytest.mark.parametrize("how", [die, interrupt], ids=["killed", "SIGTERM"])
@pytest.mark.parametrize("script", list(SCRIPTS))
@pytest.mark.slow
def test_a_run_that_dies_anywhere_leaves_the_same_files(
    script: str, how: Callable[[], None], straight_fits: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    straight, names = straight_fits[script]
    share = 1 if how is die else 3
    assert list(kills(script, names, how, share, tmp_path / "killed", straight)) == []


@pytest.mark.parametrize("how", [die, interrupt], ids=["killed", "SIGTERM"])
def test_a_run_that_dies_in_some_places_leaves_the_same_files(
    how: Callable[[], None], straight_fits: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    straight, names = straight_fits["middle"]
    assert list(kills("middle", names, how, len(names) // 5, tmp_path / "killed", straight)) == []


def test_the_best_checkpoint_survives_the_places_where_it_was_lost(
    straight_fits: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    """The first step after the best epoch, its own validation, and between `best.ckpt` and `last.ckpt`."""
    straight, names = straight_fits["middle"]
    second_best = [index for index, name in enumerate(names) if name == "after best"][1]
    after = names.index("micro-batch", second_best)
    validation = max(index for index in range(second_best) if names[index] == "validation batch")
    for point in (second_best, names.index("half of last", second_best), after, validation):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        with pytest.raises(KilledError):
            fit(tmp_path / "killed", "middle", Points(point))
        fit(tmp_path / "killed", "middle", Points())
        assert differences(tmp_path / "killed", straight) == [], names[point]


# --- the program


def summary(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {name: content[name] for name in ("scores", "steps", "truncated_captions", "skipped_clips", "parameters")}


@pytest.mark.parametrize(
    ("hook", "step", "stage", "how"),
    [
        pytest.param("validation_step", 8, 0, die, id="in the last validation", marks=pytest.mark.slow),
        pytest.param("test_step", 8, 1, die, id="in the final scoring"),
        pytest.param("validation_step", 4, 0, interrupt, id="a signal in the first validation", marks=pytest.mark.slow),
        pytest.param("test_step", 8, 0, interrupt, id="a signal in the final scoring", marks=pytest.mark.slow),
        pytest.param("training_step", 5, 0, die, id="in a step", marks=pytest.mark.slow),
    ],
)
def test_the_program_leaves_the_same_files(
    hook: str,
    step: int,
    stage: int,
    how: Callable[[], None],
    straight_run: Path,
    tiny_config: Callable[..., Config],
    tmp_path: Path,
) -> None:
    original, calls = getattr(CaptioningModule, hook), [0]
    settings = (
        "tuning.lora.dropout=0.1",
        "evaluation.swap_videos=true",
        "evaluation.swap_shifts=2",
        "trainer.checkpoint_every_n_steps=4",
    )

    def changed(self: CaptioningModule, *args: Any) -> Any:
        if self.global_step == step:
            calls[0] += 1
            if calls[0] == stage + 1:
                how()
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptioningModule, hook, changed)
        with pytest.raises((KilledError, StoppedBySignal)):
            train(tiny_config(tmp_path / "run", *settings))
    assert calls[0] == stage + 1
    train(tiny_config(tmp_path / "run", *settings, "checkpoint=last"))
    assert summary(tmp_path / "run") == summary(straight_run)
    assert same(rows(tmp_path / "run"), rows(straight_run))
    for file in (straight_run / "predictions").iterdir():
        assert (tmp_path / "run" / "predictions" / file.name).read_bytes() == file.read_bytes()
    mine, other = (
        torch.load(one / "checkpoints" / "best.ckpt", weights_only=True) for one in (tmp_path / "run", straight_run)
    )
    assert same(mine["state_dict"], other["state_dict"])
    assert (mine["global_step"], mine["epoch"]) == (other["global_step"], other["epoch"])
