"""A run that stopped anywhere and was resumed ends as one that did not stop, and two runs of one seed are one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.training.module import CaptioningModule
from vlmcap.training.run import train

MakeConfig = Callable[..., Config]
COMMON = ("tuning.lora.dropout=0.1",)


class KilledError(Exception):
    """Stands for a process that dies."""


def load(folder: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def losses(folder: Path) -> list[tuple[int, int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["epoch"], row["train/loss"]) for row in rows if "train/loss" in row]


def kill_training_at(step: int, patch: pytest.MonkeyPatch) -> None:
    original = CaptioningModule.training_step

    def training_step(self: CaptioningModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise KilledError
        return original(self, batch, batch_idx)

    patch.setattr(CaptioningModule, "training_step", training_step)


def kill_validation(_: int, patch: pytest.MonkeyPatch) -> None:
    def validation_step(self: CaptioningModule, *args: Any) -> Any:
        raise KilledError

    patch.setattr(CaptioningModule, "validation_step", validation_step)


def test_two_runs_of_one_seed_are_one(straight_run: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "again", *COMMON))
    assert losses(tmp_path / "again") == losses(straight_run)
    again, straight = load(tmp_path / "again"), load(straight_run)
    assert all(torch.equal(again["state_dict"][name], tensor) for name, tensor in straight["state_dict"].items())


def test_another_seed_is_another_run(straight_run: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "other", *COMMON, "seed=1", "trainer.max_steps=2"))
    assert losses(tmp_path / "other")[0] != losses(straight_run)[0]


# Four steps an epoch, two micro-batches a step; losses are logged every two steps, so 3 is inside a log window too.
@pytest.mark.parametrize(
    ("stop", "position"),
    [
        pytest.param(3, {"epoch": 0, "batches": 6}, id="inside the align stage", marks=pytest.mark.slow),
        pytest.param(4, {"epoch": 1, "batches": 0}, id="between the stages", marks=pytest.mark.slow),
        pytest.param(6, {"epoch": 1, "batches": 4}, id="inside the tune stage"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_end(
    straight_run: Path, tiny_config: MakeConfig, tmp_path: Path, stop: int, position: dict[str, int]
) -> None:
    folder = tmp_path / "run"
    train(tiny_config(folder, *COMMON, f"trainer.max_steps={stop}"))
    stopped = load(folder)
    assert (stopped["global_step"], stopped["vlmcap"]["position"]) == (stop, stopped["vlmcap"]["position"] | position)
    with (folder / "metrics.jsonl").open(
        "a", encoding="utf-8"
    ) as file:  # what a run writes between its last checkpoint and its death
        file.write(json.dumps({"step": stop + 1, "epoch": 1, "train/loss": 99.0}) + '\n{"step": ')
    train(tiny_config(folder, *COMMON, "checkpoint=last"))
    check_same_end(folder, straight_run)


@pytest.mark.parametrize(
    ("kill", "step", "every"),
    [
        pytest.param(kill_training_at, 3, 3, id="right after the checkpoint", marks=pytest.mark.slow),
        pytest.param(kill_training_at, 7, 3, id="in the second epoch"),
        pytest.param(kill_validation, 4, 4, id="in the validation after an epoch's last step", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_end(
    straight_run: Path,
    tiny_config: MakeConfig,
    tmp_path: Path,
    kill: Callable[[int, pytest.MonkeyPatch], None],
    step: int,
    every: int,
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill(step, patch)
        with pytest.raises(KilledError):
            train(tiny_config(folder, *COMMON, f"trainer.checkpoint_every_n_steps={every}"))
    assert load(folder)["global_step"] == step // every * every
    train(tiny_config(folder, *COMMON, f"trainer.checkpoint_every_n_steps={every}", "checkpoint=last"))
    check_same_end(folder, straight_run)


def check_same_end(folder: Path, straight: Path) -> None:
    mine, other = load(folder), load(straight)
    assert mine["global_step"] == other["global_step"] == 8
    assert (
        mine["vlmcap"]["position"]
        == other["vlmcap"]["position"]
        == other["vlmcap"]["position"] | {"epoch": 2, "batches": 0}
    )
    assert losses(folder) == losses(straight)
    assert [step for step, _, _ in losses(folder)] == [2, 4, 6, 8]
    assert mine["state_dict"].keys() == other["state_dict"].keys()
    different = [
        name for name, tensor in other["state_dict"].items() if not torch.equal(tensor, mine["state_dict"][name])
    ]
    assert not different
    states = other["optimizer_states"][0]["state"]
    assert mine["optimizer_states"][0]["state"].keys() == states.keys()
    for index, state in states.items():
        assert all(torch.equal(value, mine["optimizer_states"][0]["state"][index][key]) for key, value in state.items())


def test_a_finished_run_resumed_trains_no_further(straight_run: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = straight_run / "checkpoints" / "last.ckpt"
    train(tiny_config(tmp_path / "more", *COMMON, f"checkpoint={checkpoint}"))
    summary = json.loads((tmp_path / "more" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 8
    assert losses(tmp_path / "more") == []


def test_resuming_on_another_base_is_refused(
    straight_run: Path, tiny_config: MakeConfig, tiny_cache: Path, tmp_path: Path
) -> None:
    import shutil

    parts = next((tiny_cache / "demo").glob("parts*"))
    other = tmp_path / "llm"
    shutil.copytree(parts / "llm", other)
    settings = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(settings | {"rope_theta_note": 1}), encoding="utf-8")
    checkpoint = straight_run / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"trained on the llm .* but llm\.checkpoint is"):
        train(tiny_config(tmp_path / "run", *COMMON, f"llm.checkpoint={other}", f"checkpoint={checkpoint}"))


def test_resuming_another_architecture_is_refused(straight_run: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = straight_run / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"another architecture: .*projector"):
        train(tiny_config(tmp_path / "run", *COMMON, "projector=linear", f"checkpoint={checkpoint}"))


def test_resuming_without_a_checkpoint_is_refused_before_anything_is_made(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"checkpoint=last: .*paths\.output_dir"):
        train(tiny_config(tmp_path / "none", "checkpoint=last"))
    assert not (tmp_path / "none").exists()
