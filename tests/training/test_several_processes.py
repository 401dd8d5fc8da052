"""Two processes train as one does, the first one writes, and any number of processes reads the checkpoint."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.ranks import run_all
from vlmcap.compose import compose
from vlmcap.config import Strategy
from vlmcap.errors import UserError
from vlmcap.training.checkpoints.load import single_process
from vlmcap.training.checks import check_strategy
from vlmcap.training.processes import (
    describe_batch,
    launch_command,
    make_strategy,
    num_processes,
    process_rank,
    receives_weights,
)

TWO = ["hardware.devices=2", "trainer.accumulate_grad_batches=1", "trainer.log_every_n_steps=1"]
ONE = ["trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=l4"], r"llm\.quantization=4bit.*set llm\.quantization=none, or trainer=ddp"),
        (["hardware.precision=fp16"], r"no gradient scaler for hardware\.precision=fp16; set hardware\.precision=bf16"),
        (["optim=adamw_8bit"], r"optim=adamw_8bit does not support; set optim=adamw"),
        (["tuning.lora.use_experts=true"], r"set tuning\.lora\.use_experts=false"),
        (
            ["hardware=l4", "llm.quantization=none", "hardware.offload_checkpoints=true"],
            r"offload_checkpoints=true; set hardware\.offload_checkpoints=false",
        ),
    ],
)
def test_what_fsdp2_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_strategy(compose(["trainer=fsdp2", *overrides]))
    check_strategy(compose(["trainer=ddp", "hardware.devices=2", *overrides]))


def test_ranks_as_launchers_tell_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["trainer=fsdp2", "hardware.devices=4", "trainer.num_nodes=2"])
    for name in (
        "LOCAL_RANK",
        "RANK",
        "NODE_RANK",
        "GROUP_RANK",
        "TORCHELASTIC_RUN_ID",
        "SLURM_NTASKS",
        "SLURM_PROCID",
    ):
        monkeypatch.delenv(name, raising=False)
    assert (num_processes(config), process_rank(config), receives_weights(config)) == (8, 0, False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("NODE_RANK", "1")
    assert (process_rank(config), receives_weights(config)) == (7, True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "5")
    assert process_rank(config) == 5
    assert process_rank(single_process(config)) == 0
    for name in ("LOCAL_RANK", "RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name)
    for name, value in {
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
        "SLURM_JOB_NAME": "train",
    }.items():
        monkeypatch.setenv(name, value)
    assert process_rank(config) == 6


def test_the_strategy_and_the_batch_of_a_configuration() -> None:
    assert type(make_strategy(compose([]))).__name__ == "SingleStrategy"
    assert describe_batch(compose(["data.batch_size=4"])) == "4 clips × 1"
    shared = compose(["trainer=ddp", "hardware.devices=2", "data.batch_size=4", "trainer.accumulate_grad_batches=8"])
    assert type(make_strategy(shared)).__name__ == "SharedStrategy"
    assert describe_batch(shared) == "4 clips × 8 × 2 devices (ddp) = 64 clips per step"
    assert type(make_strategy(compose(["trainer=fsdp2", "hardware.devices=2"]))).__name__ == "ShardedStrategy"
    assert single_process(shared).trainer.strategy is Strategy.auto


def test_a_process_of_a_job_gets_the_job_s_overrides_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hydra.core.hydra_config import HydraConfig

    overrides = SimpleNamespace(task=["llm=tiny", "seed=1", "paths.output_dir=elsewhere"])
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(overrides=overrides))
    command = launch_command(compose([f"paths.output_dir={tmp_path}"]))
    at = command.index("llm=tiny")
    assert command[at : at + 3] == ["llm=tiny", "seed=1", f"paths.output_dir='{tmp_path}'"]
    assert {f"hydra.run.dir='{tmp_path}'", "hydra.output_subdir=null"} <= set(command)


@pytest.mark.parametrize("started", ["vlmcap", "-m vlmcap.cli", "-m vlmcap.sweeping.child", "train.py"])
def test_other_processes_run_the_command_again(started: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vlmcap train` and a launcher's job start `vlmcap train`; a script starts itself."""
    module = {"-m vlmcap.cli": "vlmcap.cli.__main__", "-m vlmcap.sweeping.child": "vlmcap.sweeping.child"}.get(started)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None if module is None else ModuleSpec(module, None))
    monkeypatch.setattr(sys, "argv", [f"/bin/{started}" if module is None else "x.py", "seed=1"])
    job = SimpleNamespace(
        job=SimpleNamespace(config_name="train"), overrides=SimpleNamespace(task=["data.root='도심'"])
    )
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.initialized", lambda: True)
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: job)
    command = launch_command(compose([f"paths.output_dir={tmp_path / '도 심'}"]))
    argv = [sys.executable, "/bin/train.py"] if started == "train.py" else [sys.executable, "-m", "vlmcap.cli", "train"]
    assert command[: len(argv) + 1] == [*argv, "data.root='도심'"]
    assert f"paths.output_dir='{tmp_path / '도 심'}'" in command


@pytest.fixture(scope="module")
def runs(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    checkpoint = "checkpoint=" + str(folder / "{}" / "checkpoints" / "last.ckpt")
    whole = "tuning.epochs=2"
    run_all(
        folder,
        tiny_cache,
        {
            "one": (1, [*ONE, whole]),
            "ddp": (2, [*TWO, whole, "trainer=ddp"]),
            "fsdp2": (2, [*TWO, whole, "trainer=fsdp2", "hardware.gradient_checkpointing=true"]),
            "one_half": (1, [*ONE, "trainer.max_steps=4"]),
            "fsdp2_half": (2, [*TWO, "trainer.max_steps=4", "trainer=fsdp2"]),
            "one_after_two": (1, [*ONE, checkpoint.format("fsdp2_half")]),
            "two_after_one": (2, [*TWO, "trainer=fsdp2", checkpoint.format("one_half")]),
        },
        timeout_s=900,
    )
    return folder


def logged(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[name] for row in rows if name in row]


def weights(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """By the norm: where a gradient is nearly zero, AdamW's quotient makes a step of another order of summation."""
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(runs: Path, name: str) -> None:
    for metric in ("train/loss", "val/loss", "val/cider"):
        assert logged(runs / name, metric) == pytest.approx(logged(runs / "one", metric), rel=1e-5), metric
    assert len(logged(runs / name, "train/loss")) == 8
    one, two = weights(runs / "one"), weights(runs / name)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, tensor in one["state_dict"].items():
        assert type(two["state_dict"][key]) is torch.Tensor
        assert_near(two["state_dict"][key], tensor)
    for split in ("val", "test"):
        texts = [(runs / run / "predictions" / f"{split}.jsonl").read_text(encoding="utf-8") for run in ("one", name)]
        assert texts[0] == texts[1]
    summaries = [json.loads((runs / run / "summary.json").read_text(encoding="utf-8")) for run in ("one", name)]
    assert summaries[0]["truncated_captions"] == summaries[1]["truncated_captions"] == 24
    assert (runs / f"{name}-1.log").read_text(encoding="utf-8").count("BLEU") == 0, "the first process prints"
    assert len(logged(runs / name, "val/loss")) == 2, "and writes, once"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_after_two", "two_after_one"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(runs: Path, name: str) -> None:
    assert logged(runs / name, "train/loss") == pytest.approx(logged(runs / "one", "train/loss")[4:], rel=1e-5)
    for key, tensor in weights(runs / "one")["state_dict"].items():
        assert_near(weights(runs / name)["state_dict"][key], tensor)
    assert (
        weights(runs / name)["optimizer_states"][0]["state"].keys()
        == weights(runs / "one")["optimizer_states"][0]["state"].keys()
    )
