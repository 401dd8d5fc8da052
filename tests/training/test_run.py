"""What a run leaves behind, and what `train()` returns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.training.module import CaptioningModule
from vlmcap.training.run import train
from vlmcap.training.summary import plain_scores, planned_values

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def summary(straight_run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((straight_run / "summary.json").read_text(encoding="utf-8"))
    return content


def test_a_run_folder_holds_its_files_and_nothing_half_written(straight_run: Path) -> None:
    files = {str(path.relative_to(straight_run)) for path in straight_run.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "metrics.csv",
        "summary.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    } <= files
    assert not [name for name in files if ".partial" in name]
    assert "skipped_clips.jsonl" not in files, "made at the first bad clip"


def test_the_summary_says_scores_costs_and_versions(summary: dict[str, Any]) -> None:
    for name in (
        "val/cider",
        "val/meteor",
        "val/facts/mean",
        "test/cider",
        "test/chrf",
        "test/swapped/cider",
        "test/permuted/facts/place",
    ):
        assert name in summary["scores"], name
    assert summary["tokenizer"].startswith("mecab")
    assert summary["steps"] == 8
    assert (summary["truncated_captions"], summary["skipped_clips"]) == (24, 0)
    assert 0 < summary["seconds"]["fit"] < summary["seconds"]["total"]
    assert 0.1 < summary["peak_memory_gib"] < 100
    assert {"vlmcap", "torch", "lightning", "transformers", "peft", "mecab-ko", "python"} <= set(summary["versions"])
    assert {"git_revision", "command"} <= set(summary)


def test_the_summary_says_what_the_plan_expected_of_what_was_trained(tiny_config: MakeConfig, tmp_path: Path) -> None:
    overrides = [
        "data.batch_size=4",
        "trainer.accumulate_grad_batches=2",
        "evaluation.every_n_epochs=2",
        "evaluation.max_clips=3",
    ]
    config = tiny_config(tmp_path, *overrides)
    run = SimpleNamespace(data=SimpleNamespace(clips={"train": range(20), "val": range(9)}))
    plan = SimpleNamespace(peak_gib=9.5, device=SimpleNamespace(usable_gib=22.0), clip_s=0.5, caption_s=2.0)
    # 10 steps of 8 clips are four epochs of 20, with two validations of 3 captions.
    assert planned_values(config, cast(Any, run), cast(Any, plan), 10) == {
        "peak_gib": 9.5,
        "usable_gib": 22.0,
        "fit_s": 52.0,
    }
    assert planned_values(config, cast(Any, run), None, 10) is None


def test_the_summary_counts_trained_and_frozen_parameters(summary: dict[str, Any]) -> None:
    parts = summary["parameters"]
    assert parts["projector"]["trained"] == parts["projector"]["parameters"] > 0
    assert parts["adapters"]["trained"] == parts["adapters"]["parameters"] > 0
    assert parts["llm"]["trained"] == 0 < parts["llm"]["parameters"]


def test_train_returns_the_monitored_metric(straight_run: Path, summary: dict[str, Any]) -> None:
    assert json.loads((straight_run / "objective.json").read_text()) == summary["scores"]["val/cider"]


def test_a_checkpoint_may_follow_a_metric_that_is_slow(tiny_config: MakeConfig, tmp_path: Path) -> None:
    train(
        tiny_config(
            tmp_path / "run",
            "monitor=val/meteor",
            "trainer.max_steps=1",
            "tuning.epochs=1",
            "evaluation.every_n_epochs=1",
        )
    )
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any("val/meteor" in row and "val/loss" in row for row in logged)
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


def test_any_measured_metric_is_returned_and_another_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    assert (
        0
        <= train(tiny_config(tmp_path / "run", "monitor=val/length_ratio", "trainer.max_steps=1", "tuning.epochs=1"))
        < 1000
    )
    with pytest.raises(UserError, match=r"monitor=val/beauty is not measured while training; choose .*cider"):
        train(tiny_config(tmp_path / "other", "monitor=val/beauty"))
    assert not (tmp_path / "other").exists(), "said before anything is trained"


def test_a_best_checkpoint_of_an_earlier_run_is_not_taken(
    straight_run: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    foreign = {"vlmcap": {"base_checkpoints": {}}, "state_dict": {"captioner.projector.foreign": torch.zeros(1)}}
    torch.save(foreign, tmp_path / "checkpoints" / "best.ckpt")
    # No validation in training, so that this run has no best checkpoint of its own.
    train(tiny_config(tmp_path, "trainer.max_steps=1", "evaluation.every_n_epochs=9"))
    assert (tmp_path / "summary.json").is_file()


def test_ctrl_c_in_training_reaches_the_program(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(CaptioningModule, "training_step", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(tmp_path))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not (tmp_path / "summary.json").exists()


def test_training_is_deterministic_and_captioning_is_not_with_the_numbers_of_either(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"training": set(), "captioning": set(), "writing back": set()}
    forward, own_ids, step = (
        VideoCaptioner.forward,
        VideoCaptioner._native_ids,
        CaptioningModule.on_before_optimizer_step,
    )

    def note(name: str, function: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            seen[name].add(
                torch.are_deterministic_algorithms_enabled()
                and not torch.is_deterministic_algorithms_warn_only_enabled()
            )
            return function(*arguments)

        return noted

    monkeypatch.setattr(VideoCaptioner, "forward", note("training", forward))
    monkeypatch.setattr(VideoCaptioner, "_native_ids", note("captioning", own_ids))
    monkeypatch.setattr(CaptioningModule, "on_before_optimizer_step", note("writing back", step))
    losses, captions = [], []
    torch.use_deterministic_algorithms(False)  # whatever an earlier test of this process left
    for value in ("auto", "false"):
        for found in seen.values():
            found.clear()
        folder = tmp_path / value
        train(tiny_config(folder, f"trainer.deterministic={value}"))
        is_on = value == "auto"  # on a CPU
        assert seen == {"training": {is_on}, "captioning": {False}, "writing back": {is_on}}
        assert not torch.are_deterministic_algorithms_enabled(), "it ends with the run"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses.append([row[name] for row in rows for name in ("train/loss", "val/loss") if name in row])
        captions.append((folder / "predictions" / "val-epoch=01.jsonl").read_text(encoding="utf-8"))
    assert losses[0] == losses[1] and len(losses[0]) > 4
    assert captions[0] == captions[1]


@pytest.mark.parametrize(
    ("value", "accelerator", "is_on"), [("auto", "gpu", False), ("true", "gpu", True), ("false", "cpu", False)]
)
def test_auto_is_off_on_a_gpu(
    value: str, accelerator: str, is_on: bool, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, f"trainer.deterministic={value}", f"hardware.accelerator={accelerator}")
    assert config.is_deterministic is is_on


def test_another_value_of_deterministic_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.deterministic must be true, false or auto, not warn"):
        tiny_config(tmp_path, "trainer.deterministic=warn")


def test_a_plan_without_epochs_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no epoch to train"):
        train(tiny_config(tmp_path / "run", "tuning.align_epochs=0", "tuning.epochs=0"))
    assert not (tmp_path / "run").exists()


def test_scores_that_are_no_number_become_null() -> None:
    assert plain_scores({"a": math.nan, "b": 0.5}) == {"a": None, "b": 0.5}
