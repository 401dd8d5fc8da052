"""`metrics.jsonl`, and Weights & Biases without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmcap.build.run import Run
from vlmcap.compose import to_plain
from vlmcap.config import Config
from vlmcap.training.loggers import JsonlLogger, make_loggers

MakeConfig = Callable[..., Config]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_log_step_is_one_object_on_one_line(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"train/loss": 1, "epoch": 2.0}, step=10)
    logger.log_metrics({"val/bleu_4": 0.25}, step=12)
    assert lines(logger.path) == [{"step": 10, "epoch": 2, "train/loss": 1.0}, {"step": 12, "epoch": None, "val/bleu_4": 0.25}]


def test_later_and_torn_lines_are_cut(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        logger.log_metrics({"train/loss": step}, step=step)
    with logger.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "epo')
    logger.cut_after(2)
    assert [row["step"] for row in lines(logger.path)] == [1, 2]
    logger.log_metrics({"train/loss": 5}, step=3)
    assert [row["step"] for row in lines(logger.path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cutting_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    JsonlLogger(tmp_path / "metrics.jsonl").cut_after(5)
    assert not list(tmp_path.iterdir())


def test_a_new_run_starts_its_file_anew(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    JsonlLogger(tmp_path / "metrics.jsonl").log_metrics({"train/loss": 1}, step=0)
    make_loggers(config, {}, tmp_path, None)
    assert lines(tmp_path / "metrics.jsonl") == []


@pytest.fixture(scope="module")
def wandb_folder(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """The folder of a fitted run with `logger=wandb`, and what it printed of W&B."""
    import contextlib
    import io

    import wandb

    folder, printed = tmp_path_factory.mktemp("wandb-run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(folder / "staged"))
        patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
        with contextlib.redirect_stdout(printed):
            run = make_run(tiny_config(folder, "logger=wandb", "data.tune_epochs=0", "evaluation.num_table_rows=2"))
        run.trainer.fit(run.module, datamodule=run.data)
        wandb.finish()
    yield folder, printed.getvalue()


def test_wandb_offline_is_said_in_one_line(wandb_folder: tuple[Path, str]) -> None:
    (line,) = [line for line in wandb_folder[1].splitlines() if "W&B" in line]
    assert line.startswith("W&B: offline, as WANDB_MODE=offline says; `wandb sync ")


def joined_records(content: bytes) -> bytes:
    """The content of W&B's record file without the headers that cut it: blocks of 32 KiB, each part after checksum, length and type."""
    joined, position = b"", 7
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        if left < 7 or length == 0:
            position += left
            continue
        joined += content[position + 7 : position + 7 + length]
        position += 7 + length
    return joined


def test_wandb_offline_run_names_group_tags_and_configuration(wandb_folder: tuple[Path, str]) -> None:
    (record,) = wandb_folder[0].glob("wandb/offline-run-*/run-*.wandb")
    content = joined_records(record.read_bytes())
    for expected in ("tiny+tiny", "tiny-mlp-tiny-two_stage-s0", "encoder=tiny", "llm=tiny", "projector=mlp", "tuning=two_stage"):
        assert expected.encode() in content, expected
    for key in (b"max_caption_tokens", b"accumulate_grad_batches", b"align_epochs", b"val/cider", b"train/loss"):
        assert key in content, key


def test_wandb_table_shows_clip_thumbnails_prediction_and_reference(wandb_folder: tuple[Path, str]) -> None:
    from PIL import Image

    folder, _ = wandb_folder
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/val/captions*.table.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    rows = lines(folder / "predictions" / "val-epoch=00.jsonl")[:2]
    assert content["columns"] == ["id", "frames", "prediction", "reference"]
    assert [[row[0], row[2], row[3]] for row in content["data"]] == [[r["id"], r["prediction"], r["references"][0]] for r in rows]
    staged = [path for path in folder.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"]
    sizes = {Image.open(path).size for path in staged}
    assert len(staged) >= 2
    assert all(width == 4 * height for width, height in sizes), "four frames side by side"


def test_the_resolved_configuration_is_plain_data(tiny_config: MakeConfig, tmp_path: Path) -> None:
    plain = to_plain(tiny_config(tmp_path))
    assert json.loads(json.dumps(plain)) == plain
