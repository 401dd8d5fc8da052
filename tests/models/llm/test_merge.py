"""Merged weights give the logits of base checkpoint and adapters; what cannot be merged is refused."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vlmcap.config import LlmConfig, LoraConfig
from vlmcap.errors import UserError
from vlmcap.files import new_folder
from vlmcap.models.llm import merge as merging
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.llm.merge import (
    Routing,
    adapters_for_inference,
    load_adapters,
    load_unadapted_weights,
    merge,
    merge_layers,
    merged_model,
    save_merged,
)
from vlmcap.models.llm.prompt import load_prompt

KINDS: dict[str, dict[str, bool]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def load(folder: Path, dtype: torch.dtype = torch.float32, quantization: str = "none") -> Any:
    return load_language_model(folder, dtype=dtype, quantization=quantization, attention="sdpa", device="cpu")


def adapter_of(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    lora = LoraConfig(**{"rank": 4, "alpha": 8, "dropout": 0.1, **settings})
    return lambda model: add_lora(model, lora)


def trained(model: Any) -> Any:
    """Gives a model non-zero adapters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(1.2)
    return model.eval()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """Returns them with the names of a training checkpoint, together with a projector."""
    named = {f"captioner.llm.{name}": p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    return {
        **named,
        "captioner.projector.weight": torch.zeros(1),
        "captioner.encoder.tower.q.lora_A.default.weight": torch.zeros(1),
    }


def merge_adapters(
    base: Path,
    weights: dict[str, Tensor],
    output: Path,
    *,
    adapt: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype = torch.float32,
) -> float:
    """Writes a base checkpoint with merged adapters; returns the relative difference of logits."""
    merged, difference = merged_model(base, weights, adapt=adapt, dtype=dtype)
    with new_folder(output) as partial:
        save_merged(merged, base, partial)
    return difference


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=torch.arange(40).view(2, 20)).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_folder_gives_the_logits_of_base_and_adapters(llm_folder: Path, tmp_path: Path, kind: str) -> None:
    adapt = adapter_of(**KINDS[kind])
    model = trained(adapt(load(llm_folder)))
    expected, base = logits(model), logits(load(llm_folder))
    assert (expected - base).abs().max() > 0.5  # or the test would show nothing
    difference = merge_adapters(llm_folder, adapters(model), tmp_path / "merged", adapt=adapt)
    assert difference < 1e-5
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())
    assert merged.state_dict().keys() == load(llm_folder).state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_in_sixteen_bit_the_effect_of_the_adapters_survives(llm_folder: Path, tmp_path: Path, kind: str) -> None:
    adapt = adapter_of(**KINDS[kind])
    model = trained(adapt(load(llm_folder, torch.bfloat16)))
    expected, base = logits(model).float(), logits(load(llm_folder, torch.bfloat16)).float()
    difference = merge_adapters(llm_folder, adapters(model), tmp_path / "merged", adapt=adapt, dtype=torch.bfloat16)
    merged = load(tmp_path / "merged", torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert difference < 0.05 < 0.3 < (expected - base).norm() / base.norm()
    assert (logits(merged).float() - expected).norm() / expected.norm() < 0.05


def test_experts_are_merged_too(moe_folder: Path, tmp_path: Path) -> None:
    adapt = adapter_of(use_experts=True)
    model = trained(adapt(load(moe_folder)))
    with torch.no_grad():
        for module in model.modules():
            for factor in getattr(module, "lora_B", {}).values() if type(module).__name__ == "FusedExperts" else ():
                factor.normal_(std=0.2)
    expected = logits(model)
    merge_adapters(moe_folder, adapters(model), tmp_path / "merged", adapt=adapt)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys() == _all_weights(moe_folder).keys()
    )  # the hub's own layout


def _all_weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_folder_is_whole(llm_folder: Path, tmp_path: Path) -> None:
    adapt = adapter_of()
    merge_adapters(llm_folder, adapters(trained(adapt(load(llm_folder)))), tmp_path / "merged", adapt=adapt)
    old, new = (load_prompt(folder, LlmConfig()) for folder in (llm_folder, tmp_path / "merged"))
    assert (new.prefix_ids, new.suffix_ids, new.stop_ids) == (old.prefix_ids, old.suffix_ids, old.stop_ids)
    assert [file.name for file in tmp_path.iterdir()] == ["merged"]


def test_settings_that_transformers_would_not_write(llm_folder: Path, tmp_path: Path) -> None:
    """Vicuna's sampling values without sampling."""
    folder = shutil.copytree(llm_folder, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}))
    adapt = adapter_of()
    merge_adapters(folder, adapters(trained(adapt(load(folder)))), tmp_path / "merged", adapt=adapt)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["temperature"] == 0.9


def test_nothing_is_left_of_a_failed_save(llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt = adapter_of()
    weights = adapters(trained(adapt(load(llm_folder))))

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)  # after the weights were written
    with pytest.raises(OSError, match="no space"):
        merge_adapters(llm_folder, weights, tmp_path / "merged", adapt=adapt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_weights_are_refused(llm_folder: Path, quantization: str) -> None:
    model = adapter_of()(load(llm_folder, torch.float32, quantization))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"quantised weights.*llm\.quantization=none"):
        merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_merge_that_changes_the_model_is_refused(
    llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a merge that loses the adapters."""
    from peft.tuners.lora import Linear

    adapt = adapter_of()
    weights = adapters(trained(adapt(load(llm_folder))))
    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    with pytest.raises(UserError, match="logits differ"):
        merge_adapters(llm_folder, weights, tmp_path / "merged", adapt=adapt)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_do_not_fit(llm_folder: Path) -> None:
    weights = adapters(trained(adapter_of()(load(llm_folder))))
    lacking = dict(list(weights.items())[1:])
    with pytest.raises(UserError, match=r"is missing in the checkpoint; set tuning\.lora"):
        load_adapters(adapter_of()(load(llm_folder)), lacking)
    with pytest.raises(UserError, match=r"has no place in the model; set tuning\.lora"):
        load_adapters(adapter_of(target_modules="q_proj")(load(llm_folder)), weights)
    with pytest.raises(UserError, match=r"tuning\.lora\.rank"):
        load_adapters(adapter_of(rank=2)(load(llm_folder)), weights)


def test_no_second_copy_of_the_weights_is_held(llm_folder: Path) -> None:
    """Merging needs memory for one layer at most in addition to the model."""
    model = trained(adapter_of(target_modules="down_proj")(load(llm_folder)))
    largest = max(p.numel() for p in model.parameters()) * 4
    before, seen = live_bytes(), []
    merge_layers(model, lambda *_: seen.append(live_bytes()))
    assert len(seen) == 2
    assert max(seen) <= before + largest


def live_bytes() -> int:
    """Returns the bytes of all tensors in this process, counting each storage once."""
    gc.collect()
    tensors = [
        t for t in gc.get_objects() if isinstance(t, Tensor) and not isinstance(t, FakeTensor)
    ]  # which caches of the compiler hold
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_trained_weights_of_the_model_itself(llm_folder: Path, moe_folder: Path) -> None:
    model = load(llm_folder)
    load_unadapted_weights(
        model, {"captioner.llm.model.norm.weight": torch.full((64,), 2.0), "captioner.projector.x": torch.zeros(1)}
    )
    assert (model.model.norm.weight == 2).all()
    for name, tensor in (("model.norm.weight", torch.zeros(3)), ("model.other", torch.zeros(64))):
        with pytest.raises(UserError, match=r"has no place in the model; set llm\.checkpoint"):
            load_unadapted_weights(model, {f"captioner.llm.{name}": tensor})


def test_equal_experts_do_not_make_a_good_merge_look_bad(moe_folder: Path) -> None:
    """In 16 bits, rounding errors change the routing; the comparison replays the original routing."""
    model = trained(adapter_of()(load(moe_folder, torch.bfloat16)))
    assert len(Routing(model).routers) == 3
    _, difference = merge(model)
    assert difference < 0.05


def test_the_probe_is_shorter_than_any_context() -> None:
    assert merging._NUM_PROBE_TOKENS <= 64


def identities(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()}


def num_products(model: nn.Module) -> int:
    """Counts the linear layers that run for a token."""
    calls: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda layer, *_: calls.append(layer))
        for module in model.modules()
        if type(module) is nn.Linear
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return len(calls)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": "q_proj,down_proj"}])
def test_merged_for_captions_is_close_and_gone_afterwards(llm_folder: Path, settings: dict[str, Any]) -> None:
    bare = num_products(load(llm_folder))
    model = trained(adapter_of(**settings)(load(llm_folder)))
    before, expected, places = logits(model), num_products(model), identities(model)
    with adapters_for_inference(model, is_merged=True):
        assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
        assert not torch.equal(logits(model), logits(load(llm_folder)))
        assert num_products(model) == bare < expected, "adapters launch nothing"
    assert identities(model) == places
    assert num_products(model) == expected
    assert torch.equal(logits(model), before)


def test_weights_come_back_after_an_error(llm_folder: Path) -> None:
    model = trained(adapter_of()(load(llm_folder, torch.bfloat16)))
    before, places = logits(model), identities(model)
    with pytest.raises(KeyboardInterrupt), adapters_for_inference(model, is_merged=True):
        raise KeyboardInterrupt
    assert identities(model) == places
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_adapters_that_stay_apart_give_the_same_bits_with_fewer_casts(llm_folder: Path, quantization: str) -> None:
    model = trained(adapter_of()(load(llm_folder, torch.bfloat16, quantization)))
    places = identities(model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        before = logits(model)
        with adapters_for_inference(model, is_merged=quantization == "4bit"):  # which cannot be
            dtypes = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
            assert dtypes == {torch.bfloat16}
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    assert identities(model) == places
    with adapters_for_inference(model, is_merged=False):
        assert identities(model) == places, "without autocast nothing would be cast"


def test_dora_and_models_without_adapters_stay_as_they_are(llm_folder: Path) -> None:
    for model in (load(llm_folder), trained(adapter_of(use_dora=True)(load(llm_folder)))):
        places = identities(model)
        with adapters_for_inference(model, is_merged=True), torch.autocast("cpu", torch.bfloat16):
            assert identities(model) == places


def test_training_goes_on_as_if_nothing_had_been_merged(llm_folder: Path) -> None:
    """Losses and weights of two steps, with and without captions between them, are equal bit for bit."""

    def losses(*, has_captions: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = trained(adapter_of(dropout=0.0)(load(llm_folder))).train()
        trained_ones = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, found = torch.optim.AdamW(trained_ones, lr=1e-2), []
        for _ in range(3):
            ids = torch.arange(40).view(2, 20)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
            if has_captions:
                with adapters_for_inference(model, is_merged=True), torch.inference_mode():
                    model(input_ids=ids)
            optimizer.zero_grad()
        return [*found, *(parameter.detach() for parameter in trained_ones)]

    for one, other in zip(losses(has_captions=True), losses(has_captions=False), strict=True):
        assert torch.equal(one, other)
