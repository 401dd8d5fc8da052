"""What Lightning's strategies do with the model when a fit or a test ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from vlmcap.compose import compose
from vlmcap.training.processes import make_strategy


def copies_to_the_host(strategy: Strategy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the model was moved to the host by a fit and two tests."""
    moves: list[str] = []
    model = BoringModel()
    monkeypatch.setattr(model, "cpu", lambda: moves.append("cpu"))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=2,
        limit_val_batches=0,
        default_root_dir=folder,
        **quiet,
    )
    trainer.fit(model)
    assert strategy.model is strategy.lightning_module is model
    for _ in range(2):
        trainer.test(model, verbose=False)
    return len(moves)


def test_the_model_stays_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert copies_to_the_host(make_strategy(compose(["hardware=cpu"])), tmp_path, monkeypatch) == 0
    assert copies_to_the_host(SingleDeviceStrategy("cpu"), tmp_path, monkeypatch) == 3  # Lightning's own
