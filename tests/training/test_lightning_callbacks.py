"""Lightning's own callbacks and a user's, unchanged, by `callbacks.extra`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.training.tiny_training import tiny_data, tiny_training
from vlmcap.compose import compose
from vlmcap.config import Config, Split
from vlmcap.errors import UserError
from vlmcap.training.checks import extra_callbacks
from vlmcap.training.objects import Run
from vlmcap.training.run import evaluate, train
from vlmcap.training.schedule import StagePlan

MakeConfig = Callable[..., Config]
MONITOR = "callbacks.extra=[{_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_interval: step}]"
EMA = "callbacks.extra=[{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.9}]"
DROPOUT = "tuning.lora.dropout=0.1"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


class Notes(L.Callback):
    """A user's callback: what `trainer.callback_metrics` and the optimiser say after each micro-batch."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, label: str) -> None:
        self.label = label
        self.seen.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rates = {group["component"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        self.seen.append({"step": trainer.global_step, "metrics": metrics, "next": rates, "label": self.label})


def test_a_callback_of_ones_own_reads_metrics_and_rates(
    straight_run: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", DROPOUT, f"callbacks.extra=[{{_target_: {__name__}.Notes, label: mine}}]")
    train(config)
    logged = {row["step"]: row for row in rows(tmp_path / "run") if "train/loss" in row}
    assert list(logged) == [2, 4, 6, 8]
    for note in Notes.seen:
        if note["step"] in logged:
            expected = {name: value for name, value in logged[note["step"]].items() if name.startswith("train/")}
            assert {name: note["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert {"val/loss", "val/cider"} <= Notes.seen[-1]["metrics"].keys()
    assert {note["label"] for note in Notes.seen} == {"mine"}
    # The rates are those of the step to come, to the last digit, over both stages.
    plan = StagePlan(config.tuning.stages)
    assert [note["step"] for note in Notes.seen] == [step // 2 for step in range(1, 17)]
    for note in Notes.seen[1::2]:
        assert note["next"] == {part: plan.rate(part, note["step"], 4) for part in plan.trained_components()}
    straight = {row["step"]: row["train/loss"] for row in rows(straight_run) if "train/loss" in row}
    assert {step: row["train/loss"] for step, row in logged.items()} == straight, "to listen changes nothing"


@pytest.mark.slow
def test_the_learning_rate_monitor_shows_each_group(
    straight_run: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", DROPOUT, MONITOR)
    train(config)
    plan = StagePlan(config.tuning.stages)
    # Lightning counts steps from 0, and logs in front of the step that is due.
    monitored = {row["step"]: row for row in rows(tmp_path / "run") if "lr-AdamW/projector" in row}
    assert list(monitored) == [1, 3, 5, 7]
    for step, row in monitored.items():
        assert row["lr-AdamW/adapter"] == plan.rate("adapter", step, 4)
        assert row["lr-AdamW/projector"] == row["lr-AdamW/projector_vectors"] == plan.rate("projector", step, 4) > 0
    others = [row for row in rows(tmp_path / "run") if "lr-AdamW/projector" not in row]
    speed = "train/tokens_per_s"
    assert [row | {speed: 0} for row in others if "train/loss" in row] == [
        row | {speed: 0} for row in rows(straight_run) if "train/loss" in row
    ]


def test_weight_averaging_averages_trained_weights_and_leaves_frozen_ones(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], straight_run: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, EMA, "cache.enabled=false", "tuning.epochs=1")
    run = make_run(config)
    before = {name: value.detach().clone() for name, value in run.module.named_parameters()}
    constants = {name: value.clone() for name, value in run.module.named_buffers()}
    steps: list[dict[str, torch.Tensor]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
            if trainer.global_step > len(steps):
                steps.append({name: weight.clone() for name, weight in pl_module.state_dict().items()})

    run.trainer.callbacks.insert(0, Watch())  # type: ignore[attr-defined]
    run.trainer.fit(run.module, datamodule=run.data)
    average = dict(steps[0])
    for weights in steps[1:]:
        average = {name: 0.9 * average[name] + (1 - 0.9) * weight for name, weight in weights.items()}
    after = dict(run.module.named_parameters())
    assert any(not torch.equal(average[name], steps[-1][name]) for name in average)
    for name, weight in after.items():
        expected = average[name] if name in average else before[name]
        assert (
            torch.equal(weight, expected)
            if name not in average
            else torch.allclose(weight, expected, rtol=1e-6, atol=1e-7)
        ), name
    assert all(torch.equal(value, constants[name]) for name, value in run.module.named_buffers())

    content = load(tmp_path / "checkpoints" / "last.ckpt")
    assert content["state_dict"].keys() == content["current_model_state"].keys() == average.keys(), "nothing frozen"
    assert all(torch.allclose(content["state_dict"][name], average[name], rtol=1e-6, atol=1e-7) for name in average)
    assert all(torch.equal(content["current_model_state"][name], steps[-1][name]) for name in average)


@pytest.mark.slow
def test_an_averaged_run_resumes_to_the_same_end_and_is_scored_averaged(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    train(tiny_config(straight, DROPOUT, EMA))
    train(tiny_config(folder, DROPOUT, EMA, "trainer.max_steps=6"))
    train(tiny_config(folder, DROPOUT, EMA, "checkpoint=last"))
    whole, resumed = load(straight / "checkpoints" / "last.ckpt"), load(folder / "checkpoints" / "last.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert whole[key].keys() == resumed[key].keys()
        assert all(torch.equal(weight, resumed[key][name]) for name, weight in whole[key].items()), key
    assert any(
        not torch.equal(weight, whole["current_model_state"][name]) for name, weight in whole["state_dict"].items()
    )
    # evaluate.py scores the averaged weights, and makes no callback that the configuration of a checkpoint names.
    best = straight / "checkpoints" / "best.ckpt"
    config = tiny_config(tmp_path / "evaluation", DROPOUT, "callbacks.extra=[{_target_: nowhere.Callback}]")
    scores = evaluate(replace(config, data=replace(config.data, split=Split.val)), best)
    summary = json.loads((straight / "summary.json").read_text(encoding="utf-8"))["scores"]
    assert scores["val/cider"] == summary["val/cider"]


def test_packed_4_bit_weights_stay_as_they_are(real_path: list[str], make_run: Callable[[Config], Run]) -> None:
    config = compose([*real_path, "llm.quantization=4bit", EMA, "evaluation.every_n_epochs=9"])
    run = make_run(config)
    packed = {name: value.clone() for name, value in run.module.named_parameters() if value.dtype == torch.uint8}
    assert packed
    run.trainer.fit(run.module, datamodule=run.data)
    after = dict(run.module.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in packed.items())


def test_a_copy_holds_the_trained_weights_in_their_order(tmp_path: Path) -> None:
    from copy import deepcopy

    _, module = tiny_training(tmp_path, tiny_data(), num_epochs=1)
    copied = deepcopy(module)
    assert list(copied.state_dict()) == [name for name, _ in module.named_parameters()]
    pairs = list(zip(copied.parameters(), module.parameters(), strict=True))
    assert pairs
    assert all(torch.equal(one, other) and one is not other for one, other in pairs)
    first = next(iter(module.state_dict()))
    with pytest.raises(UserError, match="another architecture"):
        module.load_state_dict({first: torch.zeros(1)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{_target_: lightning.pytorch.callbacks.LearningRateWatch}",
            r"LearningRateWatch cannot be built \(.*\); check its dotted name",
        ),
        ("{_target_: nowhere.Callback}", r"nowhere\.Callback cannot be built \(.*\); check its dotted name"),
        (
            "{_target_: lightning.pytorch.callbacks.LearningRateMonitor, interval: step}",
            r"cannot be built \(.*interval.*\)",
        ),
        (
            "{_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_interval: week}",
            r"cannot be built \(.*\)",
        ),
        (
            "{_target_: pathlib.Path}",
            r"pathlib\.Path is not a Lightning callback; give each entry a _target_ such as lightning\.",
        ),
        ("{decay: 0.9}", r"is not a Lightning callback; give each entry a _target_ such as lightning\."),
    ],
)
def test_what_is_no_callback_is_refused_in_a_sentence(entry: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"callbacks\.extra: .*{message}") as caught:
        train(compose([f"callbacks.extra=[{entry}]", f"paths.output_dir={tmp_path / 'run'}"]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "said before anything is made"


def test_shards_are_not_averaged() -> None:
    with pytest.raises(UserError, match=r"EMAWeightAveraging cannot average the shards of trainer=fsdp2"):
        extra_callbacks(compose([EMA, "trainer=fsdp2"]))
    (made,) = extra_callbacks(compose([EMA, "trainer=ddp", "hardware.devices=2"]))
    assert isinstance(made, EMAWeightAveraging)
