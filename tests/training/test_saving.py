"""What a checkpoint holds, and when it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmcap.config import Config
from vlmcap.training.callbacks.saving import AtomicCheckpointIO, StepLimit
from vlmcap.training.objects import Run
from vlmcap.training.random_state import random_states, set_random_states

MakeConfig = Callable[..., Config]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@pytest.fixture(scope="module", params=["last", "best"])
def checkpoint(request: pytest.FixtureRequest, straight_run: Path) -> dict[str, Any]:
    return read(straight_run / "checkpoints" / f"{request.param}.ckpt")


def test_it_holds_the_trained_weights_and_nothing_frozen(checkpoint: dict[str, Any], straight_run: Path) -> None:
    names = set(checkpoint["state_dict"])
    assert {name for name in names if ".projector." in name}
    assert {name for name in names if "lora_" in name}
    assert not [name for name in names if ".projector." not in name and "lora_" not in name]
    parts = json.loads((straight_run / "summary.json").read_text(encoding="utf-8"))["parameters"]
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) == sum(
        part["trained"] for part in parts.values()
    )
    # Two moments for each weight, and little beside it: no frozen weight hides elsewhere in the file.
    stored = sum(tensor.numel() for tensor in tensors(checkpoint))
    trained = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert stored < 3 * trained + 20_000 < parts["llm"]["parameters"]


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def test_it_holds_optimiser_random_states_position_and_configuration(checkpoint: dict[str, Any]) -> None:
    (optimizer,) = checkpoint["optimizer_states"]
    assert {group["component"] for group in optimizer["param_groups"]} == {"projector", "adapter"}
    held = checkpoint["vlmcap"]
    assert held["random"].keys() == {"python", "numpy", "torch", "cuda"}
    assert held["position"]["epoch"] * 4 == checkpoint["global_step"]
    assert held["config"]["llm"]["max_caption_tokens"] == 16
    assert held["config"]["tuning"]["lora"]["dropout"] == 0.1


def test_it_names_content_of_the_frozen_bases(checkpoint: dict[str, Any], tiny_cache: Path) -> None:
    bases = checkpoint["vlmcap"]["base_checkpoints"]
    assert bases.keys() == {"encoder", "llm"}
    for part, base in bases.items():
        assert base.keys() == {"name", "revision", "sha256"}
        folder = Path(base["name"])
        assert folder.is_relative_to(tiny_cache)
        assert folder.name == part
        digest = hashlib.sha256()
        content = {
            "config.json",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }
        for file in sorted(file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name in content):
            digest.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        assert base["sha256"] == digest.hexdigest()


def test_a_checkpoint_is_there_after_each_epoch_and_each_n_steps(
    tiny_config: MakeConfig, make_run: Callable[[Config], Run], tmp_path: Path
) -> None:
    import lightning as L

    run = make_run(tiny_config(tmp_path, "trainer.checkpoint_every_n_steps=3", "evaluation.every_n_epochs=2"))
    saved: list[int] = []

    class Look(L.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            if (tmp_path / "checkpoints" / "last.ckpt").is_file():
                step = read(tmp_path / "checkpoints" / "last.ckpt")["global_step"]
                if step not in saved:
                    saved.append(step)

    run.trainer.callbacks.append(Look())  # type: ignore[attr-defined]
    run.trainer.fit(run.module, datamodule=run.data)
    assert saved == [3, 4, 6]
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def test_the_best_checkpoint_is_that_of_the_best_monitored_score(straight_run: Path) -> None:
    rows = [json.loads(line) for line in (straight_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [row for row in rows if "val/cider" in row and "val/meteor" not in row]
    assert len(validations) == 2
    best = max(validations, key=lambda row: row["val/cider"])  # the first of equals
    assert read(straight_run / "checkpoints" / "best.ckpt")["global_step"] == best["step"]


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, io = tmp_path / "new" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, target)

    def die(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="no space"):
        io.save_checkpoint({"step": 2}, target)
    assert read(target) == {"step": 1}
    assert [path.name for path in target.parent.iterdir()] == ["last.ckpt"]


def test_random_states_come_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            float(np.random.rand()),
            float(np.random.randn()),
            float(torch.rand(())),
        ]

    before = random_states()
    draw()
    states = random_states()
    torch.save(states, tmp_path / "states.pt")
    expected = draw()
    draw()
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected
    set_random_states(before)


@pytest.mark.parametrize(
    ("limit", "step", "is_stopped"), [(-1, 5, False), (6, 5, False), (5, 5, True), (5, 9, True), (0, 0, True)]
)
def test_the_step_limit_stops_at_its_step(limit: int, step: int, is_stopped: bool) -> None:
    from types import SimpleNamespace

    trainer: Any = SimpleNamespace(global_step=step, should_stop=False)
    StepLimit(limit).on_train_batch_end(trainer, trainer)
    assert trainer.should_stop == is_stopped
