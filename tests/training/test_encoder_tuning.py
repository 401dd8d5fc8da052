"""`tuning.encoder=lora|full`: the encoder learns, is saved, and comes back; otherwise it is bit for bit what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlmcap.config import Config
from vlmcap.training.checkpoints.load import load_captioner, read_checkpoint
from vlmcap.training.objects import Run
from vlmcap.training.run import train

OVERRIDES = ("cache.enabled=false", "tuning.align_epochs=0", "tuning.epochs=1", "trainer.max_steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_encoder_is_trained_saved_and_loaded(tiny_config: Callable[..., Config], tmp_path: Path, kind: str) -> None:
    train(tiny_config(tmp_path, f"tuning.encoder={kind}", "tuning.encoder_lr=1e-2", *OVERRIDES))
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    saved = {
        name.removeprefix("captioner."): tensor
        for name, tensor in read_checkpoint(checkpoint)["state_dict"].items()
        if name.startswith("captioner.encoder.")
    }
    assert saved
    assert all("lora_" in name for name in saved) == (kind == "lora")
    if kind == "lora":
        assert all(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)  # they start at 0
    captioner = load_captioner(checkpoint)
    trained = dict(captioner.named_parameters())
    for name, tensor in saved.items():
        assert torch.equal(trained[name], tensor)
        assert tensor.dtype == torch.float32


def test_one_step_moves_the_encoder_only_where_it_is_tuned(
    tiny_config: Callable[..., Config], make_run: Callable[[Config], Run], tmp_path: Path
) -> None:
    for kind in ("none", "lora", "full"):
        rate = [] if kind == "none" else ["tuning.encoder_lr=1e-2"]
        run = make_run(tiny_config(tmp_path / kind, f"tuning.encoder={kind}", *rate, *OVERRIDES))
        encoder = run.module.captioner.encoder
        assert encoder is not None
        before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
        run.trainer.fit(run.module, datamodule=run.data)
        moved = {name for name, parameter in encoder.named_parameters() if not torch.equal(parameter, before[name])}
        if kind == "none":
            assert not moved
            assert not encoder.training
        elif kind == "lora":
            assert moved == {name for name in before if "lora_" in name}
        else:
            assert any("q_proj.weight" in name for name in moved)
            assert encoder.training


def test_an_alignment_stage_leaves_the_encoder_alone(
    tiny_config: Callable[..., Config], make_run: Callable[[Config], Run], tmp_path: Path
) -> None:
    run = make_run(
        tiny_config(
            tmp_path,
            "tuning.encoder=full",
            "tuning.encoder_lr=1e-2",
            *OVERRIDES,
            "tuning.align_epochs=1",
            "tuning.epochs=2",
        )
    )
    encoder = run.module.captioner.encoder
    assert encoder is not None
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    run.trainer.fit(run.module, datamodule=run.data)  # three steps, and the first stage has four
    assert all(torch.equal(parameter, before[name]) for name, parameter in encoder.named_parameters())
