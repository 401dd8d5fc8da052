"""Weights & Biases without a network.

A run and an evaluation of it, read out of the files that `wandb sync` would upload.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.training.wandb_file import WandbFile
from vlmcap.config import Config, WandbConfig
from vlmcap.config.names import (
    COLLAPSE,
    FINAL_SCORES,
    FIT_SECONDS,
    PARAMETERS,
    PEAK_MEMORY,
    RATES,
    SCORES,
    SECONDS,
    STEP,
    TEST_TABLE,
    TOKENS_PER_S,
    TRAIN_LOSS,
    TRAINED_PARAMETERS,
    VAL_LOSS,
    VAL_TABLE,
)
from vlmcap.training.callbacks.scorer import Prediction
from vlmcap.training.loggers.tables import WandbTable
from vlmcap.training.run import evaluate, train
from vlmcap.types import Clip

MakeConfig = Callable[..., Config]
SECRETS = {
    "WANDB_API_KEY": "5ecre7" * 6 + "beef",
    "HF_TOKEN": "hf_5ecre7tokenOfTheHub",
    "MLFLOW_TRACKING_PASSWORD": "5ecre7-pass",
}


@dataclass
class Done:
    """A finished training run and a finished evaluation of its checkpoint."""

    folder: Path
    evaluated: Path
    printed: str
    run: WandbFile
    evaluation: WandbFile


@pytest.fixture(scope="module")
def done(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder, evaluated, printed = (
        tmp_path_factory.mktemp("wandb-run"),
        tmp_path_factory.mktemp("wandb-eval"),
        io.StringIO(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
        patch.delenv("WANDB_DATA_DIR", raising=False)
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        words = ("logger=wandb", "tuning.align_epochs=2", "tuning.epochs=3", "logger.num_table_rows=2")
        words = (*words, "logger.table_every_n_validations=2")
        with contextlib.redirect_stdout(printed):
            train(tiny_config(folder, *words))
            evaluate(tiny_config(evaluated, *words), folder / "checkpoints" / "best.ckpt")
    yield Done(folder, evaluated, printed.getvalue(), WandbFile(folder), WandbFile(evaluated))
    os.environ.pop("WANDB_DATA_DIR", None)


@pytest.mark.slow
def test_offline_is_said_in_one_line_a_run(done: Done) -> None:
    told = [line for line in done.printed.splitlines() if "W&B" in line]
    assert len(told) == 2
    assert (
        told[0]
        == f"W&B: offline, because WANDB_MODE=offline; `wandb sync {done.folder / 'wandb'}/offline-run-*` uploads the "
        "run later."
    )


@pytest.mark.slow
def test_runs_are_grouped_tagged_and_typed(done: Done) -> None:
    run, evaluation = done.run.run, done.evaluation.run
    assert (run.display_name, run.run_group, run.job_type, run.project) == (
        "tiny-pixel_shuffle_linear-tiny-demo-s0",
        "tiny+tiny",
        "train",
        "vlmcap",
    )
    assert list(run.tags) == [
        "encoder=tiny",
        "projector=pixel_shuffle_linear",
        "llm=tiny",
        "tuning=demo",
        "hardware=cpu",
        "data=demo",
    ]
    assert (evaluation.display_name, evaluation.job_type) == (
        "tiny-pixel_shuffle_linear-tiny-demo-s0-eval-test",
        "eval",
    )
    assert (evaluation.run_group, list(evaluation.tags)) == (run.run_group, list(run.tags))
    assert evaluation.run_id != run.run_id


@pytest.mark.slow
def test_the_configuration_has_factors_as_words_and_every_setting(done: Done) -> None:
    config = done.run.config
    for name, value in {
        "encoder": "tiny",
        "projector": "pixel_shuffle_linear",
        "llm": "tiny",
        "seed": 0,
        "batch_size": 6,
        "quantization": "none",
    }.items():
        assert config[name] == value, name
    assert config["settings"]["llm"]["max_caption_tokens"] == 16
    assert config["settings"]["tuning"]["align_epochs"] == 2


def test_curves_and_final_numbers_are_there(done: Done) -> None:
    curves = set().union(*done.run.history)
    assert {TRAIN_LOSS, VAL_LOSS, TOKENS_PER_S, STEP, *RATES, *SCORES, *COLLAPSE} <= curves
    assert {f"{name}/_type" for name in (VAL_TABLE, TEST_TABLE)} <= curves
    summary, file = done.run.summary, json.loads((done.folder / "summary.json").read_text(encoding="utf-8"))
    for name in (*FINAL_SCORES, "test/cider", "test/meteor"):
        assert summary[name] == file["scores"][name], name
    assert (summary[PEAK_MEMORY], summary[SECONDS]) == (file["peak_memory_gib"], file["seconds"]["total"])
    assert 0 < summary[FIT_SECONDS] < summary[SECONDS]
    assert 0 < summary[TRAINED_PARAMETERS] < summary[PARAMETERS]
    assert summary["train/tokens_per_s"] > 0


def test_an_evaluation_logs_its_scores(done: Done) -> None:
    scores = json.loads((done.evaluated / "metrics.json").read_text(encoding="utf-8"))
    assert done.evaluation.summary["test/cider"] == scores["test/cider"] == done.run.summary["test/cider"]


def test_artifacts_lead_from_the_run_to_its_evaluation(done: Done) -> None:
    import torch

    made, used = done.run.artifacts["model"], done.evaluation.artifacts["model"]
    assert made.name == used.name == f"checkpoint-{done.run.run.run_id}"
    assert (made.digest, made.use_after_commit) == (used.digest, False)
    assert used.use_after_commit, "the evaluation's input"
    assert "best" in made.aliases
    (entry,) = made.manifest.contents
    assert Path(entry.local_path) == done.folder / "checkpoints" / "best.ckpt", "not copied"
    weights = torch.load(entry.local_path, weights_only=True)["state_dict"]
    assert weights
    assert all("projector" in name or "lora_" in name for name in weights), "no frozen weights"
    assert {one.path for one in done.run.artifacts["predictions"].manifest.contents} == {"val.jsonl", "test.jsonl"}
    assert {one.path for one in done.evaluation.artifacts["predictions"].manifest.contents} == {
        "predictions.jsonl",
        "metrics.json",
    }


def test_everything_to_upload_is_in_the_folder_of_the_run(done: Done) -> None:
    for folder, file in ((done.folder, done.run), (done.evaluated, done.evaluation)):
        for kind, artifact in file.artifacts.items():
            places = [Path(one.local_path) for one in artifact.manifest.contents]
            assert places
            assert all(place.is_file() for place in places)
            assert kind == "model" or all(place.is_relative_to(folder) for place in places), kind


def tables(done: Done, split: str) -> list[dict[str, Any]]:
    found = sorted(done.folder.glob(f"wandb/offline-run-*/files/media/table/{split}/captions*.table.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def test_tables_come_every_second_validation_and_at_the_end(done: Done) -> None:
    assert len(tables(done, "val")) == 3, "validations 1 and 3, and the whole split"
    assert len(tables(done, "test")) == 1


def test_a_table_shows_thumbnails_prediction_and_reference(done: Done) -> None:
    from PIL import Image

    rows = [
        json.loads(line)
        for line in (done.folder / "predictions" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    ][:2]
    (table,) = tables(done, "test")
    assert table["columns"] == ["id", "frames", "prediction", "reference"]
    assert [[row[0], row[2], row[3]] for row in table["data"]] == [
        [r["id"], r["prediction"], r["references"][0]] for r in rows
    ]
    (pictures,) = [one for one in done.run.records["artifact"] if one.type == "run_table" and "test" in one.name]
    files = [Path(one.local_path) for one in pictures.manifest.contents if one.path.endswith(".jpg")]
    assert len(files) == 2
    for file in files:
        with Image.open(file) as picture:
            assert (picture.format, picture.width) == ("JPEG", 4 * picture.height), "four frames side by side"
            assert picture.height <= WandbConfig().thumbnail_height


def test_no_secret_is_in_a_file(done: Done) -> None:
    files = [path for folder in (done.folder, done.evaluated) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} is in {path.name}"


class Recorder:
    """Stands for W&B's logger in `WandbTable`: counts the bytes of what it would send."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        pictures = sum(Path(row[1]._path).stat().st_size for row in data if row[1] is not None)
        self.sizes.append(pictures + sum(len(json.dumps([row[0], *row[2:]])) for row in data))


def test_tables_of_a_run_stay_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import numpy as np

    from vlmcap.data.decoding.video import write_video
    from vlmcap.training.loggers import tables as module

    monkeypatch.setattr(module, "WandbLogger", Recorder)
    noise = np.random.default_rng(0).integers(0, 255, (4, 480, 640, 3)).astype(np.uint8)
    write_video(tmp_path / "clip.mp4", noise, fps=4)
    clip = Clip("clip", str(tmp_path / "clip.mp4"), ("바다 위로 해가 떠오른다.",))
    rows = [Prediction(clip, "산")] * 20
    config = WandbConfig(max_media_mib=1, thumbnail_height=96, jpeg_quality=90)
    callback, recorder = WandbTable(cast(Any, SimpleNamespace(predictions=rows, split="val")), config), Recorder()
    trainer = cast(Any, SimpleNamespace(loggers=[recorder], is_global_zero=True, sanity_checking=False, global_step=1))
    for _ in range(8):
        callback.on_validation_end(trainer, cast(Any, None))
    assert 1 <= len(recorder.sizes) < 8
    assert sum(recorder.sizes) <= callback.sent_bytes <= 2**20
    assert sum(recorder.sizes) > 2**19, "the bound is used"
    assert (
        capsys.readouterr().out
        == "W&B: no more tables of captions are uploaded, because the limit logger.max_media_mib=1 is reached.\n"
    )
    smaller = WandbTable(cast(Any, SimpleNamespace(predictions=rows, split="val")), replace(config, jpeg_quality=10))
    assert smaller._size(rows) < callback._size(rows) / 2
