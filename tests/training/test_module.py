"""Training steps: accumulation equals one large batch, stages train their components alone, bad clips are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.thinned import thinned
from vlmcap.config import AihubConfig, Config
from vlmcap.errors import UserError
from vlmcap.training.objects import Run
from vlmcap.training.run import train
from vlmcap.types import Batch, Skipped

MakeConfig = Callable[..., Config]
MakeRun = Callable[[Config], Run]
# Dropout would draw other masks for other micro-batches.
ONE_STAGE = (
    "tuning=lora",
    "projector=mlp",
    "tuning.lora.dropout=0.0",
    "llm.max_caption_tokens=96",
    "evaluation.every_n_epochs=9",
)


class Watch(L.Callback):
    """Records the optimiser's gradients, the label tokens of micro-batches, and adapters and state after each epoch."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.label_tokens: list[int] = []
        self.adapters: list[dict[str, Tensor]] = []
        self.has_state: list[set[str]] = []
        self.encoder_modes: set[bool] = set()
        self.llm_modes: set[bool] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        if trainer.global_step > len(self.gradients):  # they stay until the next window begins
            self.gradients.append(
                {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
            )
            self.weights.append(
                {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.label_tokens.append(batch.num_label_tokens)
        if pl_module.captioner.encoder is not None:
            self.llm_modes |= {module.training for module in pl_module.captioner.llm.modules()}
            self.encoder_modes |= {module.training for module in pl_module.captioner.encoder.modules()}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        self.adapters.append({name: p.detach().clone() for name, p in named.items() if "lora_" in name})
        with_state = trainer.optimizers[0].state
        self.has_state.append({name for name, p in named.items() if p in with_state})


def watch_fit(run: Run) -> Watch:
    watch = Watch()
    run.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    run.trainer.fit(run.module, datamodule=run.data)
    return watch


@pytest.mark.parametrize("max_grad_norm", [1000.0, 0.05], ids=["unclipped", "clipped"])
def test_accumulated_micro_batches_equal_one_large_batch(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path, max_grad_norm: float
) -> None:
    # 24 clips in windows of 10: the last window of the epoch is incomplete.
    results = []
    for size, accumulate in ((10, 1), (2, 5)):
        sizes = (
            f"data.batch_size={size}",
            f"trainer.accumulate_grad_batches={accumulate}",
            f"optim.max_grad_norm={max_grad_norm}",
        )
        run = make_run(tiny_config(tmp_path / str(size), *ONE_STAGE, *sizes))
        results.append(watch_fit(run))
    large, small = results
    assert len(large.weights) == len(small.weights) == 3
    assert len(small.label_tokens) == 12
    assert len({tokens for tokens in small.label_tokens[:5]}) > 1, "equal counts would hide a mean of means"
    assert sum(small.label_tokens[:5]) == large.label_tokens[0]
    for one, many in zip(large.gradients, small.gradients, strict=True):
        assert one.keys() == many.keys()
        norm = torch.cat([g.flatten() for g in one.values()]).norm()
        assert (norm <= 0.05 * 1.001) == (max_grad_norm < 1)
        assert all(torch.allclose(one[name], many[name], atol=1e-6 * float(norm), rtol=1e-3) for name in one)
    for name, weight in large.weights[0].items():
        # Where a gradient is rounding alone, Adam makes a step of it as large as any; the gradients themselves were
        # compared above.
        is_steep = large.gradients[0][name].abs() > 1e-5 * first_norm(large)
        assert torch.allclose(weight[is_steep], small.weights[0][name][is_steep], atol=1e-6, rtol=0)


def first_norm(watch: Watch) -> float:
    return float(torch.cat([gradient.flatten() for gradient in watch.gradients[0].values()]).norm())


def test_the_loss_that_is_logged_is_a_mean_over_label_tokens(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    logged = []
    for size, accumulate in ((12, 1), (3, 4)):
        sizes = (
            f"data.batch_size={size}",
            f"trainer.accumulate_grad_batches={accumulate}",
            "trainer.log_every_n_steps=1",
        )
        run = make_run(tiny_config(tmp_path / str(size), *ONE_STAGE, *sizes))
        run.trainer.fit(run.module, datamodule=run.data)
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        logged.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)


def test_stages_move_their_parts_and_nothing_else(tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tiny_config(tmp_path, "cache.enabled=false", "optim.weight_decay=0.1"))
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    watch = watch_fit(run)
    after = dict(run.module.named_parameters())
    align, tune = watch.adapters
    assert all(torch.equal(align[name], before[name]) for name in align), "the align stage leaves the adapters alone"
    assert any(not torch.equal(tune[name], before[name]) for name in tune)
    assert watch.has_state[0] == {name for name in before if ".projector." in name}
    assert watch.has_state[1] == watch.has_state[0] | set(align)
    frozen = [name for name in before if name not in watch.has_state[1]]
    assert any(".encoder." in name for name in frozen)
    assert any(".llm." in name for name in frozen)
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert watch.encoder_modes == {False}, "a frozen encoder stays in evaluation mode"
    assert watch.llm_modes == {True}, "in evaluation mode, transformers would ignore gradient checkpointing"


def spoil(config: Config, names: list[str], folder: Path) -> Config:
    """The configuration on a copy of the demo in which some training clips are no videos."""
    import shutil

    from vlmcap.demo.prepare import prepare

    config = prepare(config)
    shutil.copytree(config.data.root, folder)
    for name in names:
        (folder / "train" / "videos" / f"{name}.mp4").write_bytes(b"no video" * 100)
    values = {name: value for name, value in vars(config.data).items() if name not in ("demo", "kind")}
    return replace(config, data=AihubConfig(**{**values, "root": str(folder)}))


@pytest.mark.slow
def test_a_clip_that_does_not_decode_is_named_counted_and_skipped(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        tmp_path / "run",
        "cache.enabled=false",
        "data.batch_size=1",
        "trainer.max_steps=12",
        "data.max_bad_fraction=0.1",
    )
    train(spoil(config, ["train_00003"], tmp_path / "data"))
    lines = (tmp_path / "run" / "skipped_clips.jsonl").read_text(encoding="utf-8").splitlines()
    (row,) = [json.loads(line) for line in lines]
    assert row["id"] == "train_00003"
    assert "cannot be read" in row["reason"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["skipped_clips"], summary["steps"]) == (1, 12), (
        "batches of one: the bad clip's batch was empty, and training went on"
    )
    assert "1 clips were skipped" in capsys.readouterr().out


@pytest.mark.parametrize("is_cached", thinned([False, True], bool), ids=["decoded", "cached"])
def test_too_many_bad_clips_end_the_run(tiny_config: MakeConfig, tmp_path: Path, is_cached: bool) -> None:
    config = tiny_config(tmp_path / "run", f"cache.enabled={str(is_cached).lower()}", "data.max_bad_fraction=0.02")
    with pytest.raises(
        UserError, match=r"more than data\.max_bad_fraction=0\.02 allows, the first being train_0000[137]"
    ):
        train(spoil(config, ["train_00001", "train_00003", "train_00007"], tmp_path / "data"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_window_of_bad_clips_changes_no_gradient(tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tiny_config(tmp_path, *ONE_STAGE, "data.max_bad_fraction=0.1"))
    run.module.trainer = run.trainer  # type: ignore[assignment]
    clips = run.data.clips["train"]
    empty = run.data.train_collator([Skipped(clip, "it is broken") for clip in clips[:1]])
    loss = run.module.training_step(empty, 0)
    assert float(loss) == 0
    loss.backward()
    gradients = [p.grad for part in run.module.trained.values() for p in part.values()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert len(run.module.skipped_log) == 1


def test_captions_without_tokens_are_named_and_long_ones_counted(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlmcap.models.llm.prompt import PromptEncoder

    original = PromptEncoder.encode_caption
    config = tiny_config(tmp_path / "run", "data.max_bad_fraction=0.1", "llm.max_caption_tokens=8", "tuning.epochs=3")
    from vlmcap.assembly.clips import load_splits
    from vlmcap.config import Split
    from vlmcap.demo.prepare import prepare

    lost = load_splits(prepare(config), [Split.train])["train"][5]
    monkeypatch.setattr(
        PromptEncoder, "encode_caption", lambda self, text: [] if text == lost.captions[0] else original(self, text)
    )
    train(config)
    (row,) = [
        json.loads(line) for line in (tmp_path / "run" / "skipped_clips.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert row["id"] == lost.id
    assert "no caption to learn from" in row["reason"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["truncated_captions"] == 23, "each training caption counts once, not once an epoch"
    assert "23 captions were truncated to llm.max_caption_tokens" in capsys.readouterr().out
