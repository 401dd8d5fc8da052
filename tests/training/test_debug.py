"""`debug=fast` meets every part of a run in two steps a stage.

`debug=overfit` learns a few clips by heart and says so.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vlmcap.assembly.clips import load_splits
from vlmcap.compose import compose
from vlmcap.config import Config, Split
from vlmcap.demo.prepare import prepare
from vlmcap.planning.sweep_budget.make_sweep_plan import num_clips
from vlmcap.training.run import train
from vlmcap.training.summary import debug_report

SMALL = [
    "data.demo.num_train=24",
    "data.demo.num_val=8",
    "data.demo.num_test=8",
    "data.num_workers=0",
    "data.num_frames=2",
    "projector.frame_stack=1",
    "projector.reducer=pool",
    "projector.pool_size=4",
    "llm.max_caption_tokens=16",
    "monitor=val/loss",
]


def small(folder: Path, cache: Path, *overrides: str) -> Config:
    return compose([*SMALL, *overrides, f"paths.output_dir={folder}", f"paths.cache_dir={cache}"])


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ([], 32),
        (["encoder=siglip2", "llm=qwen3_8b", "hardware=l4"], 32),
        (["model=qwen3_vl_8b", "hardware=h100", "hardware.devices=2", "trainer.num_nodes=2"], 128),
        (["data=jsonl", "data.root=x", "tuning=full", "llm.quantization=none", "data.batch_size=3"], 6),
        (["experiment=recommended_t4", "data.root=x", "data.max_clips=5"], 5),
    ],
    ids=["demo", "l4", "whole", "jsonl", "experiment"],
)
def test_fast_has_two_steps_of_the_runs_own_batches(overrides: list[str], most: int) -> None:
    config = compose(["debug=fast", *overrides])
    assert config.data.max_clips == most
    if "data.max_clips=5" not in overrides:
        clips_per_step = (
            config.data.batch_size
            * config.trainer.accumulate_grad_batches
            * config.hardware.devices
            * config.trainer.num_nodes
        )
        assert most == 2 * clips_per_step
    epochs = {name: stage.epochs for name, stage in compose(overrides).tuning.stages.items()}
    assert {name: stage.epochs for name, stage in config.tuning.stages.items()} == {
        name: min(number, 1) for name, number in epochs.items()
    }
    assert (num_clips(config).val, num_clips(config).test) == (2, 2)


@pytest.mark.parametrize("tuning", ["two_stage", "demo", "lora", "full", "projector_only"])
def test_overfit_takes_any_tuning(tuning: str) -> None:
    config = compose(["debug=overfit", f"tuning={tuning}", "data=jsonl", "data.root=x"])
    assert (config.tuning.num_epochs, config.monitor, config.monitor_mode) == (20, "val/loss", "min")
    counted = num_clips(config)
    assert (counted.train, counted.val, counted.test) == (8, 8, 0)


def test_a_stage_without_epochs_stays_without() -> None:
    stages = compose(["debug=fast", "tuning=two_stage", "tuning.align_epochs=0"]).tuning.stages
    assert {name: stage.epochs for name, stage in stages.items()} == {"align": 0, "tune": 1}


def test_held_out_splits_are_cut_to_their_first_clips(tiny_cache: Path, tmp_path: Path) -> None:
    config = prepare(small(tmp_path, tiny_cache, "evaluation.max_final_clips=3", "data.max_clips=5"))
    whole = load_splits(
        dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, max_final_clips=None)),
        list(Split),
    )
    cut = load_splits(config, list(Split))
    assert {split: len(clips) for split, clips in cut.items()} == {"train": 5, "val": 3, "test": 3}
    assert [clip.id for clip in cut["val"]] == [clip.id for clip in whole["val"]][:3]
    assert {split: len(clips) for split, clips in whole.items()} == {"train": 5, "val": 8, "test": 8}


def test_a_fast_run_leaves_what_a_run_leaves(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(
        small(
            tmp_path,
            tiny_cache,
            "debug=fast",
            "tuning=two_stage",
            "data.batch_size=3",
            "trainer.accumulate_grad_batches=2",
            "llm.max_new_tokens=6",
        )
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 4  # two of each stage
    for name in ("val-epoch=00", "val-epoch=01", "val", "test"):
        assert len((tmp_path / "predictions" / f"{name}.jsonl").read_text().splitlines()) == 2
    assert {file.name for file in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "Short run: training (align and tune), validation, checkpoints and the scores of 2 clips of val and 2 clips "
        "of test"
    )


def test_an_overfitting_run_scores_the_clips_that_it_trained_on(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = train(
        small(
            tmp_path, tiny_cache, "debug=overfit", "data.max_clips=2", "tuning.epochs=2", "evaluation.every_n_epochs=1"
        )
    )
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "predictions" / "val.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["id"].startswith("train_") for row in rows)
    assert not (tmp_path / "predictions" / "test.jsonl").exists()
    assert (
        f"the loss of the 2 clips that were trained on is {value:.3f}, and should fall below 0.1"
        in captured.out.splitlines()[-1]
    )
    assert "the same videos are in" not in captured.err


def test_what_was_tried_is_said() -> None:
    overfit, clips = compose(["debug=overfit"]), {"train": 8, "val": 8}
    assert "is 0.040, so these components can learn" in debug_report(overfit, {"val/loss": 0.04}, clips)
    assert "is 0.300, and should fall below 0.1: train longer" in debug_report(overfit, {"val/loss": 0.3}, clips)
    assert "is nan, and should fall" in debug_report(overfit, {}, clips)
    assert debug_report(compose([]), {"val/loss": 0.04}, clips) == ""
