"""Memory that does not do: told with the plan's advice, and on demand mended with smaller micro-batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.errors import OutOfMemoryError, UserError, is_out_of_memory
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.planning import changes
from vlmcap.planning.changes import planned_changes
from vlmcap.training.fitting import smaller_batches
from vlmcap.training.run import train

MakeConfig = Callable[..., Config]
SMALL = (
    "data.batch_size=6",
    "trainer.accumulate_grad_batches=1",
    "trainer.log_every_n_steps=1",
    "tuning.lora.dropout=0.1",
)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def hold(most: int, patch: pytest.MonkeyPatch, *, free_calls: int = 0) -> list[int]:
    """A model that runs out of memory for more than `most` clips at once, but for its first calls.

    Returns the sizes it was given.
    """
    original, sizes = VideoCaptioner.forward, []

    def forward(self: VideoCaptioner, batch: Any) -> Any:
        sizes.append(len(batch))
        if self.training and len(batch) > most and len(sizes) > free_calls:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 14.58 GiB"
            )
        return original(self, batch)

    patch.setattr(VideoCaptioner, "forward", forward)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    "free_calls", [pytest.param(0, id="in the first step"), pytest.param(3, id="in the fourth", marks=pytest.mark.slow)]
)
def test_smaller_micro_batches_train_the_same(
    free_calls: int, tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shrunk"
    with pytest.MonkeyPatch.context() as patch:
        sizes = hold(2, patch, free_calls=free_calls)
        train(tiny_config(folder, *SMALL, "trainer.shrink_on_oom=true"))
    assert [size for size in dict.fromkeys(sizes) if size in (6, 3)] == [6, 3], (
        "halved, and then to one clip, as 3 has no half"
    )
    told = capsys.readouterr().out
    assert "starting again with data.batch_size=3 trainer.accumulate_grad_batches=2" in told
    assert "starting again with data.batch_size=1 trainer.accumulate_grad_batches=6" in told
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["shrunk_from"] == 6
    kept = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert (kept["data"]["batch_size"], kept["trainer"]["accumulate_grad_batches"]) == (1, 6)

    configured = tmp_path / "configured"
    train(tiny_config(configured, *SMALL, "data.batch_size=1", "trainer.accumulate_grad_batches=6"))
    assert losses(folder) == losses(configured)
    assert json.loads((configured / "summary.json").read_text(encoding="utf-8"))["shrunk_from"] is None
    ends = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (folder, configured)
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_the_steps_are_those_of_the_batch_that_was_asked_for(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Without dropout, as its draws go by micro-batch."""
    quiet = (*SMALL[:-1], "tuning.lora.dropout=0", "cache.enabled=true")
    train(tiny_config(tmp_path / "asked", *quiet))
    with pytest.MonkeyPatch.context() as patch:
        hold(3, patch)
        train(tiny_config(tmp_path / "shrunk", *quiet, "trainer.shrink_on_oom=true"))
    assert losses(tmp_path / "shrunk") == pytest.approx(losses(tmp_path / "asked"), abs=1e-5)


def test_it_ends_with_advice_where_one_clip_is_too_much(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = hold(0, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="memory ran out at step 1"):
        train(tiny_config(tmp_path / "run", *SMALL, "trainer.shrink_on_oom=true"))
    assert sizes[:3] == [6, 3, 1], "and then the plan asks its own"


def test_unasked_it_says_what_would_help(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(2, monkeypatch)
    with pytest.raises(UserError) as caught:
        train(tiny_config(tmp_path / "run", *SMALL))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith("memory ran out at step 1 (CUDA out of memory. Tried to allocate 2.00 GiB.): ")
    assert "trainer.shrink_on_oom=true" in sentence


@pytest.mark.slow
def test_a_late_lack_of_memory_starts_nothing_again(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(2, monkeypatch, free_calls=21)
    command = (
        *SMALL,
        "trainer.shrink_on_oom=true",
        "evaluation.every_n_epochs=9",
        "tuning.align_epochs=6",
        "tuning.epochs=7",
    )
    with pytest.raises(OutOfMemoryError, match="memory ran out at step 22"):
        train(tiny_config(tmp_path / "run", *command))


@pytest.mark.slow
def test_advice_comes_from_the_plan() -> None:
    config = compose(
        ["encoder=siglip2", "llm=qwen3_4b", "hardware=l4", "data=aihub", "data.root=x", "paths.output_dir=out"]
    )
    changes = planned_changes(config)
    assert changes
    assert all("GiB)" in change and "=" in change for change in changes)


def test_a_plan_that_fails_leaves_general_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "planned_changes", lambda _: 1 / 0)
    assert changes.advice(compose(["paths.output_dir=out"])).startswith("lower data.batch_size")


@pytest.mark.parametrize(("asked", "found"), [((8, 1), (4, 2)), ((6, 2), (3, 4)), ((9, 1), (3, 3)), ((7, 2), (1, 14))])
def test_an_optimiser_step_has_the_same_number_of_clips(asked: tuple[int, int], found: tuple[int, int]) -> None:
    config = compose(
        ["paths.output_dir=out", f"data.batch_size={asked[0]}", f"trainer.accumulate_grad_batches={asked[1]}"]
    )
    smaller = smaller_batches(config)
    assert smaller is not None
    assert (smaller.data.batch_size, smaller.trainer.accumulate_grad_batches) == found


def test_one_clip_cannot_be_halved() -> None:
    assert smaller_batches(compose(["paths.output_dir=out", "data.batch_size=1"])) is None


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory at line"), False),
    ],
)
def test_which_errors_are_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one
    around = RuntimeError("in a hook")
    around.__cause__ = error
    assert is_out_of_memory(around) is is_one
