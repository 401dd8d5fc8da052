"""Loaders give what their settings say, whoever reads and wherever they start.

Ranks share evaluation without repeats.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.training.tiny_training import tiny_clips, tiny_data
from vlmcap.data.loading.datamodule import CaptionDataModule
from vlmcap.types import Batch

ROOT = Path(__file__).resolve().parents[3]
BATCHINGS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "by length": {"batching": "by_length"},
    "in a budget": {"batching": "by_length", "max_tokens_per_batch": 90},
    "packed": {"batching": "packed", "max_tokens_per_batch": 90},
}


def batches_of(data: CaptionDataModule, epoch: int = 0) -> list[Batch]:
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return list(loader)


def as_rank(data: CaptionDataModule, rank: int, world_size: int) -> CaptionDataModule:
    data.trainer = cast(L.Trainer, SimpleNamespace(global_rank=rank, world_size=world_size))
    return data


def same(one: list[Batch], other: list[Batch]) -> bool:
    def content(batch: Batch) -> Tensor:
        assert batch.features is not None
        return torch.cat([batch.input_ids.flatten().float(), batch.features.flatten()])

    return [batch.clips for batch in one] == [batch.clips for batch in other] and all(
        map(torch.equal, map(content, one), map(content, other))
    )


@pytest.mark.parametrize("kind", sorted(BATCHINGS))
def test_training_batches(kind: str) -> None:
    batches = batches_of(tiny_data(**BATCHINGS[kind]))
    assert sorted(clip.id for batch in batches for clip in batch.clips) == sorted(clip.id for clip in tiny_clips())
    assert all(batch.labels is not None for batch in batches)
    if kind == "packed":
        assert all(batch.input_ids.shape[0] == 1 and batch.input_ids.shape[1] <= 90 for batch in batches)
        assert max(len(batch) for batch in batches) > 1
    else:
        assert all(batch.input_ids.shape[0] == len(batch) for batch in batches)
    if kind == "in a budget":
        assert max(len(batch) for batch in batches) > 3
        assert all(batch.input_ids.numel() <= 90 for batch in batches)
    elif kind != "packed":
        assert {len(batch) for batch in batches} == {3, 2}


def test_workers_and_a_resume_give_the_same_batches() -> None:
    straight = batches_of(tiny_data(batching="by_length"), epoch=1)
    assert same(batches_of(tiny_data(batching="by_length", num_workers=2), epoch=1), straight)
    assert not same(batches_of(tiny_data(batching="by_length"), epoch=2), straight)
    position = tiny_data(batching="by_length").train_dataloader().batch_sampler.position(1, 4)  # type: ignore[union-attr]
    for num_workers in (0, 2):
        data = tiny_data(batching="by_length", num_workers=num_workers)
        data.resume_at(position)
        assert same(batches_of(data, epoch=1), straight[4:])
        assert len(batches_of(data, epoch=1)) == len(straight), "a position is taken once"


def test_features_drawn_at_random_differ_from_epoch_to_epoch() -> None:
    one, other = (
        {
            clip.id: cast(Any, batch.features)[row]
            for batch in batches_of(tiny_data(), epoch)
            for row, clip in enumerate(batch.clips)
        }
        for epoch in (0, 1)
    )
    assert one.keys() == other.keys()
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_validation_is_neither_packed_nor_shuffled() -> None:
    data = tiny_data(**BATCHINGS["packed"])
    batches = list(data.val_dataloader())
    prompts, labelled = [batch.prompts for batch in batches], [part for batch in batches for part in batch.labelled]
    assert [clip.id for batch in prompts for clip in batch.clips] == [f"clip{index}" for index in range(5)]
    assert [clip for batch in prompts for clip in batch.clips] == [clip for batch in labelled for clip in batch.clips]
    assert all(batch.labels is None for batch in prompts)
    assert [batch.input_ids.shape[0] for batch in prompts] == [4, 1]
    assert [batch.input_ids.shape[0] for batch in labelled] == [3, 1, 1], (
        "the loss is computed on batches of the size of training"
    )
    assert all(batch.features is None for batch in labelled), "they are those of the prompts"
    assert same([batch.prompts for batch in data.val_dataloader()], prompts)
    assert [batch.clips for batch in data.prompt_loader("val")] == [batch.clips for batch in prompts]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens_per_batch": 90}, r"data\.max_tokens_per_batch=90 needs .* data\.batching=by_length or packed"),
        (
            {"batching": "packed"},
            r"data\.batching=packed .* data\.max_tokens_per_batch tokens, which has no value; set it",
        ),
        (
            {"batching": "packed", "max_tokens_per_batch": 30},
            r"the clip clip\d+ takes 31 tokens, more than .*=30; set that to at least 31",
        ),
        ({"batching": "by_length", "max_tokens_per_batch": 30}, r"the clip clip\d+ takes 31 tokens"),
    ],
)
def test_impossible_budgets(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_data(**settings).train_dataloader()


@pytest.mark.parametrize("num_clips", [1, 5, 26])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_evaluate_each_clip_once(num_clips: int, world_size: int) -> None:
    data = tiny_data(tiny_clips(num_clips), max_eval_clips=100)
    loaders = [as_rank(data, rank, world_size).prompt_loader("val") for rank in range(world_size)]
    seen = [clip.id for loader in loaders for batch in loader for clip in batch.clips]
    assert sorted(seen) == sorted(f"clip{index}" for index in range(num_clips))
    assert max(map(len, loaders)) - min(map(len, loaders)) <= 1


RANK = """
import json, sys
from pathlib import Path
import lightning as L
import torch.distributed as dist
from tests.training.tiny_training import tiny_data, tiny_training

class Watch(L.Callback):
    train, val = [], []
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.train.append([clip.id for clip in batch.clips])
    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.val.extend(clip.id for clip in batch.prompts.clips)

data = tiny_data(batching="by_length")
trainer, module = tiny_training(
    Path(sys.argv[1]), data, num_epochs=1, devices=2, strategy="ddp", callbacks=[Watch()], accumulate_grad_batches=1
)
trainer.fit(module, datamodule=data)
seen = [None, None]
dist.all_gather_object(seen, (Watch.train, Watch.val))
if dist.get_rank() == 0:
    print(json.dumps([dist.get_backend(), trainer.global_step, seen]))
"""


@pytest.mark.slow
def test_two_processes_share_training_and_evaluation(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=common | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    backend, steps, ((train, val), (other_train, other_val)) = json.loads(outputs[0].splitlines()[-1])
    assert backend == "gloo"
    assert len(train) == len(other_train) == steps > 1
    trained = [clip for batch in train + other_train for clip in batch]
    assert sorted(trained) == sorted(clip.id for clip in tiny_clips())
    assert sorted(val + other_val) == [f"clip{index}" for index in range(5)]
