"""A resumed run continues its record in W&B, MLflow, TensorBoard, trackio and CSV; a fresh run begins a new one."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from tests.training.wandb_file import WandbFile
from vlmcap.config import Config
from vlmcap.training.loggers import others
from vlmcap.training.loggers.identity import FILE, known_ids
from vlmcap.training.loggers.make import end_evaluation_loggers, make_evaluation_loggers, make_loggers
from vlmcap.training.loggers.wandb_run import end_wandb
from vlmcap.training.run import train

MakeConfig = Callable[..., Config]


@pytest.fixture
def start(tiny_config: MakeConfig, tmp_path: Path) -> Iterator[Callable[..., list[Logger]]]:
    """Returns a function that starts the loggers of a run in `tmp_path / "run"` and logs losses until it is killed."""

    def make(
        kind: str, step: int | None, last: int, *overrides: str, folder: str = "run", resumes: str = "last"
    ) -> list[Logger]:
        (tmp_path / folder).mkdir(exist_ok=True)
        words = (f"logger={kind}", *([f"checkpoint={resumes}"] if step is not None else []), *overrides)
        loggers = make_loggers(tiny_config(tmp_path / folder, *words), {}, tmp_path / folder, step)
        for at in range((step or 0) + 1, last + 1):
            for logger in loggers:
                logger.log_metrics({"train/loss": at + len(words) / 100, "epoch": 0}, step=at)
        return loggers

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("WANDB_DATA_DIR", "WANDB_RUN_ID", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield make
        end_wandb()
    os.environ.pop("WANDB_DATA_DIR", None)


# --- W&B --------------------------------------------------------------------------------------------------------------


def segment(folder: Path, number: int) -> WandbFile:
    end_wandb()
    return WandbFile(folder, number)


@pytest.mark.slow
def test_wandb_segments_of_a_resumed_run_have_one_id(start: Callable[..., list[Logger]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start("wandb", None, 4)
    assert known_ids(folder), "kept from the start, as a killed run has no end"
    first = segment(folder, 1).run
    start("wandb", 2, 4)
    second = segment(folder, 2).run
    assert first.run_id == second.run_id == known_ids(folder)["wandb"]
    start("wandb", 4, 6)
    assert segment(folder, 3).run.run_id == first.run_id


@pytest.mark.slow
def test_wandb_runs_from_the_start_and_from_elsewhere_are_new(
    start: Callable[..., list[Logger]], tmp_path: Path
) -> None:
    start("wandb", None, 2)
    ids = {segment(tmp_path / "run", 1).run.run_id}
    start("wandb", None, 2)  # in an overwritten folder
    ids.add(segment(tmp_path / "run", 2).run.run_id)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    start("wandb", 2, 4, folder="other", resumes=str(checkpoint))  # from another run's checkpoint
    ids.add(segment(tmp_path / "other", 1).run.run_id)
    start("wandb", 2, 4, folder="other", resumes=str(checkpoint))
    ids.add(segment(tmp_path / "other", 2).run.run_id)
    assert len(ids) == 4
    start("wandb", 2, 4, resumes=str(checkpoint))  # by its path and not by "last"
    assert segment(tmp_path / "run", 3).run.run_id == known_ids(tmp_path / "run")["wandb"]


def test_the_id_that_an_agent_sets_counts(
    start: Callable[..., list[Logger]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("wandb", None, 2)
    end_wandb()
    monkeypatch.setenv("WANDB_RUN_ID", "agents1d")
    start("wandb", 2, 4)
    assert segment(tmp_path / "run", 2).run.run_id == known_ids(tmp_path / "run")["wandb"] == "agents1d"


def test_a_run_from_the_start_forgets_the_ids_of_other_loggers(
    start: Callable[..., list[Logger]], tmp_path: Path
) -> None:
    start("wandb", None, 2)
    end_wandb()
    start("none", 2, 4)
    assert known_ids(tmp_path / "run"), "a resumed run may log elsewhere for a while"
    start("csv", None, 2)
    assert not (tmp_path / "run" / FILE).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"wandb": 3}'])
def test_a_broken_file_of_ids_is_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert known_ids(tmp_path) == {}


def test_an_evaluation_names_the_run_of_its_checkpoint(
    start: Callable[..., list[Logger]], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    start("wandb", None, 2)
    end_wandb()
    before = known_ids(tmp_path / "run")
    config = tiny_config(tmp_path / "eval", "logger=wandb", "logger.log_checkpoints=none")
    (tmp_path / "eval").mkdir()
    loggers = make_evaluation_loggers(config, {}, tmp_path / "eval")
    end_evaluation_loggers(
        loggers, config, tmp_path / "eval", tmp_path / "run" / "checkpoints" / "best.ckpt", {"test/cider": 0.5}
    )
    found = WandbFile(tmp_path / "eval")
    updates = {key: value for row in found.records["config"] for key, value in found._items(row.update).items()}
    assert updates["train_run"] == before["wandb"] != found.run.run_id
    assert known_ids(tmp_path / "run") == before
    assert not (tmp_path / "eval" / FILE).exists()


@pytest.mark.slow
def test_a_whole_run_that_is_resumed_is_one_run(start: object, tiny_config: MakeConfig, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", ("logger=wandb", "logger.log_checkpoints=none", "logger.num_table_rows=1")
    train(tiny_config(folder, *words, "trainer.max_steps=3"))
    first = WandbFile(folder)
    train(tiny_config(folder, *words, "trainer.max_steps=6", "checkpoint=last"))
    second = WandbFile(folder, 2)
    assert first.run.run_id == second.run.run_id
    steps = [[row["trainer/global_step"] for row in file.history if "train/loss" in row] for file in (first, second)]
    assert steps == [[2], [4, 6]]


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "sqlite"])
def mlflow_store(request: pytest.FixtureRequest, start: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow")
    if request.param == "file":
        return f"file:{tmp_path / 'run' / 'mlruns'}"
    pytest.importorskip("sqlalchemy")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.mark.slow
def test_mlflow_goes_on_with_its_run(start: Callable[..., list[Logger]], mlflow_store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    start("mlflow", None, 3)[1].finalize("failed")
    start("mlflow", 2, 4, "data.batch_size=3")  # whose parameters MLflow lets nobody change
    client = MlflowClient(mlflow_store)
    experiment = client.get_experiment_by_name("vlmcap")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == known_ids(tmp_path / "run")["mlflow"]
    assert run.info.status == "RUNNING"
    assert sorted({metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")}) == [1, 2, 3, 4]
    start("mlflow", None, 2)
    assert len(client.search_runs([experiment.experiment_id])) == 2, "a run from the start is a new one"
    client.delete_run(known_ids(tmp_path / "run")["mlflow"])
    start("mlflow", 2, 4)
    assert len(client.search_runs([experiment.experiment_id])) == 2, "so is one whose record is gone"


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_each_step_once(start: Callable[..., list[Logger]], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        return [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")]

    start("tensorboard", None, 5)[1].save()
    assert [step for step, _ in read()] == [1, 2, 3, 4, 5]
    start("tensorboard", 3, 6)[1].save()
    first, again = 0.01, 0.02  # number of words of each start
    assert read() == [(1, 1 + first), (2, 2 + first), (3, 3 + first), (4, 4 + again), (5, 5 + again), (6, 6 + again)]
    start("tensorboard", None, 2)[1].save()
    assert [step for step, _ in read()] == [1, 2], "an overwritten run leaves no events"


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_loses_no_row_and_has_none_twice(start: Callable[..., list[Logger]], tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.csv"

    def read() -> list[tuple[int, float]]:
        with file.open(newline="") as lines:
            return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(lines) if row["train/loss"]]

    start("csv", None, 5)  # killed before the file was written, which Lightning does every 100 steps
    assert not file.exists()
    loggers = start("csv", 3, 6)
    assert [step for step, _ in read()] == [1, 2, 3], "there at once"
    loggers[1].log_metrics({"val/cider": 0.5}, step=6)
    loggers[1].save()
    assert read() == [(1, 1.01), (2, 2.01), (3, 3.01), (4, 4.02), (5, 5.02), (6, 6.02)]
    start("csv", None, 2)[1].save()
    assert [step for step, _ in read()] == [1, 2]


# --- trackio ----------------------------------------------------------------------------------------------------------


def test_trackio_goes_on_under_the_name_that_it_gave(
    start: Callable[..., list[Logger]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def init(**words: Any) -> SimpleNamespace:
        asked.append(words)
        return SimpleNamespace(
            name="calm-river-3" if words["resume"] == "never" else words["name"]
        )  # the name was taken

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, log=lambda metrics, step: None))
    monkeypatch.setattr(others, "require_package", lambda *_: None)
    start("trackio", None, 2)
    assert json.loads((tmp_path / "run" / FILE).read_text()) == {"trackio": "calm-river-3"}
    start("trackio", 2, 4)
    assert [(words["name"], words["resume"]) for words in asked] == [
        ("tiny-pixel_shuffle_linear-tiny-demo-s0", "never"),
        ("calm-river-3", "allow"),
    ]
