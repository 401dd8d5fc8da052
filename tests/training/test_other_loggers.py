"""TensorBoard, MLflow and trackio by one word each: a run, read back by the tool's own reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.training.loggers import others
from vlmcap.training.loggers.make import make_loggers
from vlmcap.training.run import train

MakeConfig = Callable[..., Config]
SHORT = ("tuning.epochs=1", "trainer.max_steps=2")


def last_metrics(folder: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        merged |= json.loads(line)
    return merged


def test_tensorboard(tiny_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config(tmp_path, "logger=tensorboard", *SHORT))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = last_metrics(tmp_path)
    for name in ("train/loss", "val/cider", "test/cider"):
        assert events.Scalars(name)[-1].value == pytest.approx(logged[name], rel=1e-6), name
    assert {"peak_memory_gib", "seconds/total", "parameters/trained"} <= set(events.Tags()["scalars"])
    assert events.Scalars("final/val/cider")[-1].value == pytest.approx(logged["val/cider"], rel=1e-6)
    files = list((tmp_path / "tensorboard").glob("events.*"))
    assert any(b"_hparams_/session_start_info" in file.read_bytes() for file in files), "the table of runs"


@pytest.mark.slow
def test_mlflow(tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # so that it is taken back afterwards
    train(tiny_config(tmp_path, "logger=mlflow", *SHORT))
    client = MlflowClient(f"file:{tmp_path / 'mlruns'}")
    experiment = client.get_experiment_by_name("vlmcap")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny-pixel_shuffle_linear-tiny-demo-s0", "FINISHED")
    assert (run.data.tags["group"], run.data.tags["encoder"], run.data.tags["job_type"]) == (
        "tiny+tiny",
        "tiny",
        "train",
    )
    assert (run.data.params["llm"], run.data.params["seed"]) == ("tiny", "0")
    logged = last_metrics(tmp_path)
    for name in ("train/loss", "val/cider", "test/cider"):
        assert run.data.metrics[name] == pytest.approx(logged[name]), name
    assert run.data.metrics["peak_memory_gib"] > 0


@pytest.mark.skipif(
    find_spec("trackio") is None, reason="trackio asks for another Pillow than ours, so that it is no extra"
)
def test_trackio(tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when trackio is imported
    train(tiny_config(tmp_path / "run", "logger=trackio", *SHORT))
    with sqlite3.connect(tmp_path / "store" / "vlmcap.db") as store:
        rows = [json.loads(row[0]) for row in store.execute("select metrics from metrics order by id")]
        ((name, config),) = store.execute("select run_name, config from configs")
    merged = {key: value for row in rows for key, value in row.items()}
    logged = last_metrics(tmp_path / "run")
    for key in ("train/loss", "val/cider", "test/cider"):
        assert merged[key] == pytest.approx(logged[key]), key
    assert {"peak_memory_gib", "parameters/trained"} <= merged.keys()
    assert (name, json.loads(config)["encoder"], json.loads(config)["job_type"]) == (
        "tiny-pixel_shuffle_linear-tiny-demo-s0",
        "tiny",
        "train",
    )


@pytest.mark.parametrize(
    ("kind", "mend"),
    [
        ("tensorboard", "pip install 'vlmcap[tensorboard]'"),
        ("mlflow", "pip install 'vlmcap[mlflow]'"),
        ("trackio", "docs/howto/loggers.md says how to install it"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_written(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mend: str
) -> None:
    monkeypatch.setattr(others, "find_spec", lambda name: None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError) as caught:
        make_loggers(tiny_config(tmp_path, f"logger={kind}"), {}, tmp_path, None)
    assert str(caught.value).startswith(f"logger={kind} needs the package {kind}, which is not installed: {mend}")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
