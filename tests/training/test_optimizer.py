"""Kinds of AdamW: the same steps, resumed as if never stopped, with clipping and loss scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny_training import tiny_data, tiny_training
from vlmcap.compose import compose
from vlmcap.config import OptimConfig, OptimKind
from vlmcap.errors import UserError
from vlmcap.training import optimizer as optimizer_module
from vlmcap.training.optimizer import make_optimizer

KINDS = list(OptimKind)
ADAMW, FUSED, EIGHT_BIT = OptimKind.adamw, OptimKind.adamw_fused, OptimKind.adamw_8bit


def tiny_parts(seed: int = 0) -> dict[str, dict[str, nn.Parameter]]:
    torch.manual_seed(seed)
    return {
        "projector": {"weight": nn.Parameter(torch.randn(96, 64)), "bias": nn.Parameter(torch.randn(96))},
        "adapter": {"lora_A": nn.Parameter(torch.randn(8, 64)), "lora_B": nn.Parameter(torch.randn(96, 8))},
    }


def steps(kind: OptimKind, count: int = 30, scaler: Any = None) -> tuple[dict[str, Tensor], list[float], Any]:
    """Fits a small regression; weights, losses and the optimiser."""
    parts = tiny_parts()
    optimizer = make_optimizer(parts, OptimConfig(kind=kind, weight_decay=0.1))
    weights = {name: parameter for part in parts.values() for name, parameter in part.items()}
    generator, losses = torch.Generator().manual_seed(1), []
    target = torch.randn(96, 64, generator=generator)
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / count)
        inputs = torch.randn(128, 64, generator=generator)
        outputs = inputs @ (weights["weight"] + weights["lora_B"] @ weights["lora_A"]).T + weights["bias"]
        loss = (outputs - inputs @ target.T).square().mean()
        losses.append(loss.item())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights.values(), 1e9)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in weights.items()}, losses, optimizer


def test_fused_steps_are_those_of_the_plain_kind() -> None:
    (plain, _, _), (fused, _, optimizer) = steps(ADAMW), steps(FUSED)
    assert all(group["fused"] for group in optimizer.param_groups)
    before = {name: parameter for part in tiny_parts().values() for name, parameter in part.items()}
    for name, weight in plain.items():
        assert float((weight - before[name].detach()).norm()) > 0.1
        assert float((fused[name] - weight).norm()) <= 1e-6 * float(weight.norm())


def test_the_plain_kind_is_torchs_own() -> None:
    optimizer = make_optimizer(tiny_parts(), OptimConfig(weight_decay=0.1))
    assert type(optimizer) is torch.optim.AdamW
    described = [
        (g["component"], g["weight_decay"], len(g["params"]), g["lr"], g["betas"]) for g in optimizer.param_groups
    ]
    betas = (0.9, 0.95)
    assert described == [
        ("projector", 0.1, 1, 0.0, betas),
        ("projector", 0.0, 1, 0.0, betas),
        ("adapter", 0.1, 2, 0.0, betas),
    ]


def test_8_bit_states_train_as_well_in_a_quarter_of_the_memory() -> None:
    (_, plain, _), (weights, losses, optimizer) = steps(ADAMW), steps(EIGHT_BIT)
    assert losses[-1] == pytest.approx(plain[-1], rel=0.1)
    assert losses[-1] < 0.7 * losses[0]
    states = {parameter.shape: state for parameter, state in optimizer.state.items()}
    large, small = states[(96, 64)], states[(96, 8)]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    assert small["state1"].dtype == torch.float32, "of few numbers, where scales would not be worth it"
    assert weights["weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_steps_under_loss_scaling_are_those_without(kind: OptimKind) -> None:
    scaled, _, _ = steps(kind, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plain, _, _ = steps(kind)
    for name, weight in plain.items():
        assert float((scaled[name] - weight).norm()) <= 1e-5 * float(weight.norm())


def train(folder: Path, kind: OptimKind, resumed: Path | None = None, **settings: Any) -> dict[str, Any]:
    data = tiny_data()
    trainer, module = tiny_training(folder, data, num_epochs=2, **settings)
    module.optim_config = OptimConfig(kind=kind)
    trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("kind", [FUSED, EIGHT_BIT])
def test_a_resumed_run_ends_as_one_that_did_not_stop(
    kind: OptimKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "_MIN_8BIT_SIZE", 1)
    straight = train(tmp_path / "straight", kind)
    stopped = train(tmp_path / "stopped", kind, max_steps=4)
    assert stopped["global_step"] == 4 < straight["global_step"]
    resumed = train(tmp_path / "stopped", kind, tmp_path / "stopped" / "checkpoints" / "last.ckpt")
    assert resumed["global_step"] == straight["global_step"]
    assert all(torch.equal(tensor, resumed["state_dict"][name]) for name, tensor in straight["state_dict"].items())
    found = [sorted(map(str, flat(checkpoint["optimizer_states"][0]["state"]))) for checkpoint in (resumed, straight)]
    assert found[0] == found[1]
    assert any("uint8" in text for text in found[0]) == (kind is EIGHT_BIT)


def flat(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [leaf for value in content.values() for leaf in flat(value)]
    return [(content.dtype, content.tolist())] if isinstance(content, Tensor) else [content]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_goes_on_in_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    train(tmp_path / "run", ADAMW, max_steps=4)
    resumed = train(tmp_path / "fused", FUSED, last)
    assert all(group["fused"] for group in resumed["optimizer_states"][0]["param_groups"])
    again = train(tmp_path / "plain", ADAMW, last)
    assert not any(group["fused"] for group in again["optimizer_states"][0]["param_groups"])
    for name, tensor in again["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], tensor, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        UserError, match=r"cannot be converted to optim\.kind=adamw_8bit; set optim\.kind=adamw, or start a new run"
    ):
        train(tmp_path / "other", EIGHT_BIT, last)
    train(tmp_path / "eight", EIGHT_BIT, max_steps=4)
    with pytest.raises(UserError, match=r"cannot be converted to optim\.kind=adamw_fused; set optim\.kind=adamw_8bit"):
        train(tmp_path / "other", FUSED, tmp_path / "eight" / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_in_mixed_precision(kind: OptimKind, tmp_path: Path) -> None:
    """Lightning refuses to clip in front of an optimiser that unscales by itself, as a fused one says it does."""
    assert train(tmp_path, kind, precision="bf16-mixed", max_steps=2)["global_step"] == 2


@pytest.mark.parametrize("kind", [FUSED, EIGHT_BIT])
def test_other_devices_are_refused(kind: OptimKind) -> None:
    parts = {"projector": {"weight": nn.Parameter(torch.empty(4, 4, device="meta"))}}
    with pytest.raises(
        UserError, match=rf"optim\.kind={kind.value} needs a CPU or a CUDA device, but the model is on meta"
    ):
        make_optimizer(parts, OptimConfig(kind=kind))


def test_the_files() -> None:
    for kind in KINDS:
        assert compose([f"optim={kind.value}", "paths.output_dir=out"]).optim.kind is kind
    assert cast(Any, compose(["paths.output_dir=out"])).optim.kind is ADAMW
