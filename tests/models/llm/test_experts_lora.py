"""Adapters on attention next to packed experts, and on the experts themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmcap.config import LoraConfig
from vlmcap.errors import UserError
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.experts import MATRICES, add_expert_lora, fused_experts, merge_expert_lora
from vlmcap.models.llm.experts_quantization import expert_quantization
from vlmcap.models.llm.load import load_language_model, quantization_config

IDS = torch.arange(40).view(2, 20)


def load(folder: Path, quantization: str = "4bit", dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    if quantization == "4bit":
        options |= {
            "quantization_config": expert_quantization(folder, quantization_config("4bit", dtype)),
            "device_map": "cpu",
        }
    return AutoModelForCausalLM.from_pretrained(folder, **options).requires_grad_(False).eval()


def with_attention_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


def with_expert_lora(model: Any, *, rank: int = 4, is_random: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"alpha": 8, "dropout": 0.0, "use_rslora": False} | options
    assert add_expert_lora(model, LoraConfig(rank=rank, **settings)) == 3
    if is_random:  # as after training
        for experts in fused_experts(model):
            for factor in experts.lora_B.values():
                nn.init.normal_(factor, std=0.05)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, steps: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_attention_adapters_learn_beside_packed_experts(moe_folder: Path, use_checkpointing: bool) -> None:
    model = with_attention_lora(load(moe_folder, dtype=torch.bfloat16)).train()
    if use_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = [experts.gate_up_proj.data.clone() for experts in fused_experts(model)]
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    assert all("self_attn" in name and "lora_" in name for name in trained(model))
    assert all(
        torch.equal(experts.gate_up_proj.data, before)
        for experts, before in zip(fused_experts(model), packed, strict=True)
    )


@pytest.mark.parametrize("quantization", ["4bit", "none"])
def test_expert_adapters_change_nothing_at_first_and_learn(moe_folder: Path, quantization: str) -> None:
    model = load(moe_folder, quantization)
    before = logits(model)
    with_expert_lora(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    names = trained(model)
    assert len(names) == 3 * 2 * 2
    assert all(".experts.lora_" in name and p.dtype == torch.float32 for name, p in names.items())
    losses = train(model.train())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.allclose(logits(model.eval()), before, atol=1e-2)


def test_every_expert_has_factors_of_its_own(moe_folder: Path) -> None:
    experts = fused_experts(with_expert_lora(load(moe_folder, "none"), rank=5))[0]
    assert [tuple(experts.lora_A[name].shape) for name in MATRICES] == [(8, 5, 64), (8, 5, 64)]
    assert [tuple(experts.lora_B[name].shape) for name in MATRICES] == [(8, 128, 5), (8, 64, 5)]
    assert all(not factor.any() for factor in experts.lora_B.values())
    assert len(experts.lora_A["gate_up_proj"].unique(dim=0)) == 8


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_scale_and_deltas_are_those_of_the_paper(moe_folder: Path, use_rslora: bool, scale: float) -> None:
    model = with_expert_lora(load(moe_folder, "none"), is_random=True, use_rslora=use_rslora)
    reference = load(moe_folder, "none")
    for experts, layer in zip(fused_experts(model), reference.model.layers, strict=True):
        assert experts.lora_scale == scale
        for name in MATRICES:
            stock = getattr(layer.mlp.experts, name)
            stock.data += scale * torch.einsum("eor,eri->eoi", experts.lora_B[name], experts.lora_A[name]).detach()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only(moe_folder: Path) -> None:
    model = with_expert_lora(load(moe_folder), is_random=True, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


@pytest.mark.parametrize("quantization", ["4bit", "none"])
def test_trained_factors_save_and_load_by_name(moe_folder: Path, quantization: str) -> None:
    model = with_expert_lora(with_attention_lora(load(moe_folder, quantization)), is_random=True)
    names = trained(model)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    assert kept.keys() == names.keys()
    fresh = with_expert_lora(with_attention_lora(load(moe_folder, quantization)))
    assert not torch.allclose(logits(fresh), logits(model), atol=1e-3)
    assert not fresh.load_state_dict(kept, strict=False).unexpected_keys
    assert torch.equal(logits(fresh), logits(model))


def test_peft_sees_its_own_adapters_only(moe_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    model = with_attention_lora(load(moe_folder))
    before = set(get_peft_model_state_dict(model))
    assert before
    with_expert_lora(model)
    assert set(get_peft_model_state_dict(model)) == before
    nn.init.normal_(next(p for name, p in model.named_parameters() if "lora_B" in name and "q_proj" in name), std=0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(moe_folder), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_both_kinds_of_adapters_are_trained_together(moe_folder: Path) -> None:
    model = with_expert_lora(with_attention_lora(load(moe_folder)))
    names = trained(model)
    assert {"self_attn" in name for name in names} == {True, False}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in names.values())


def test_through_the_projects_own_functions_no_router_is_adapted(moe_folder: Path) -> None:
    model = load_language_model(moe_folder, dtype=torch.float32, quantization="4bit", attention="sdpa", device="cpu")
    adapted = add_lora(model, LoraConfig(rank=4, alpha=8, use_experts=True))
    names = trained(adapted)
    assert len(names) == 3 * (4 * 2 + 2 * 2)  # four linear layers of attention, two matrices of experts
    assert not any(".gate." in name for name in names)


def test_merged_experts_answer_as_before_and_load_as_a_stock_checkpoint(moe_folder: Path, tmp_path: Path) -> None:
    model = with_expert_lora(load(moe_folder, "none"), is_random=True)
    before, plain = logits(model), logits(load(moe_folder, "none"))
    assert not torch.allclose(before, plain, atol=1e-2)
    assert merge_expert_lora(model) == 3
    assert not any("lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, "none")), before, rtol=1e-4, atol=1e-4)


def test_merging_onto_bfloat16_rounds_once(moe_folder: Path) -> None:
    model = with_expert_lora(load(moe_folder, "none", torch.bfloat16), is_random=True)
    experts = fused_experts(model)[0]
    exact = (
        copy.deepcopy(experts.down_proj.data).float()
        + 2.0 * (experts.lora_B["down_proj"] @ experts.lora_A["down_proj"]).detach()
    )
    merge_expert_lora(model)
    assert torch.equal(experts.down_proj.data, exact.bfloat16())


def test_merging_into_four_bit_is_refused(moe_folder: Path) -> None:
    with pytest.raises(UserError, match=r"llm\.quantization=none"):
        merge_expert_lora(with_expert_lora(load(moe_folder)))


def test_a_model_without_experts_is_refused(llm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"tuning\.lora\.use_experts"):
        add_expert_lora(load(llm_folder), LoraConfig(rank=4, alpha=8, use_rslora=False))
