"""Experts in 4 bits match transformers' module, and autograd saves little."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from vlmcap.errors import UserError
from vlmcap.models.llm import experts as experts_module
from vlmcap.models.llm.experts import (
    FusedExperts,
    fused_experts,
    pack_experts,
    replace_experts,
    stock_experts,
    unpack_experts,
)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def tiny_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=24,  # no other weight has this size
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )


def stock_module(dtype: torch.dtype = torch.float32) -> Qwen3MoeExperts:
    config = tiny_config()
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.2).to(dtype)
    return module.requires_grad_(False)


def pack(module: nn.Module) -> FusedExperts:
    packed = [pack_experts(module.gate_up_proj.data), pack_experts(module.down_proj.data)]
    result = FusedExperts(module.gate_up_proj, module.down_proj, module.act_fn)
    result.gate_up_proj, result.down_proj = packed
    return result


def unpacked(module: nn.Module) -> Qwen3MoeExperts:
    """Returns transformers' module with the unpacked weights."""
    twin = copy.deepcopy(module)
    for name in experts_module.MATRICES:
        bits, state = quantize_4bit(getattr(module, name).data, compress_statistics=True, quant_type="nf4")
        getattr(twin, name).data = dequantize_4bit(bits, state)
    return twin


def routing(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 64, generator=generator).to(dtype)
    weights, index = torch.randn(tokens, 8, generator=generator).softmax(-1).topk(2)
    return hidden, index, weights.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 64, 64), (5, 24, 40), (3, 256, 128)])
def test_packing_gives_the_bits_of_bitsandbytes_and_any_experts_come_out(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack_experts(weight)
    bits, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(packed.data, bits)
    assert packed.quant_state == state
    whole = dequantize_4bit(bits, state)
    assert torch.equal(unpack_experts(packed, dtype), whole)
    some = torch.tensor([2, 0, 2])
    assert torch.equal(unpack_experts(packed, dtype, some), whole[some])


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_outputs_and_gradients_equal_those_of_the_stock_module_with_the_same_weights(tokens: int) -> None:
    module = stock_module()
    hidden, index, weights = routing(tokens)
    results = []
    for experts in (pack(module), unpacked(module)):
        inputs = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        output = experts(inputs[0], index, inputs[1])
        output.square().sum().backward()
        results.append([output, *(x.grad for x in inputs)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, **TOLERANCE)
    assert not torch.allclose(results[0][0], module(hidden, index, weights), **TOLERANCE)  # else nothing was rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_own_rounding(dtype: torch.dtype) -> None:
    module = stock_module(dtype)
    hidden, index, weights = routing(50, dtype)
    output = pack(module)(hidden, index, weights)
    exact = unpacked(module).float()(hidden.float(), index, weights.float())
    assert output.dtype == dtype
    # Three products and a sum, each rounded once: a few units in the last place of the largest value.
    torch.testing.assert_close(
        output.float(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max().item()
    )


def test_autocast_changes_neither_types_nor_the_way_back() -> None:
    experts = pack(stock_module())
    hidden, index, weights = routing(20)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(hidden, index, weights)
    output.sum().backward()
    assert output.dtype == hidden.dtype == hidden.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(output, experts(hidden, index, weights), rtol=0.05, atol=0.05)


def test_packed_weights_survive_casts_moves_and_copies() -> None:
    experts = pack(stock_module())
    arguments = routing(10)
    before = experts(*arguments)
    for moved in (
        experts.to(torch.bfloat16),
        experts.float(),
        experts.half(),
        experts.to("cpu"),
        copy.deepcopy(experts),
    ):
        assert moved.is_packed
        assert torch.equal(moved(*arguments), before)
        assert not any(p.requires_grad for p in moved.parameters())


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives() -> None:
    experts = pack(stock_module())
    arguments = routing(10)
    before = experts(*arguments)
    output = experts.to("cuda")(*(x.cuda() for x in arguments))
    assert experts.is_packed
    torch.testing.assert_close(output.cpu(), before, rtol=1e-4, atol=1e-4)


def loop(experts: FusedExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Computes the same with plain products, one expert after the other."""
    total = torch.zeros_like(hidden)
    for expert in range(experts.num_experts):
        tokens, places = (index == expert).nonzero(as_tuple=True)
        rows = hidden[tokens]
        for name in experts_module.MATRICES:
            weight = getattr(experts, name)
            matrix = unpack_experts(weight, torch.float32)[expert] if experts.is_packed else weight[expert]
            output = rows @ matrix.T
            if name in experts.lora_A:
                output = (
                    output + rows @ experts.lora_A[name][expert].T @ experts.lora_B[name][expert].T * experts.lora_scale
                )
            gate, up = output.chunk(2, -1) if name == "gate_up_proj" else (None, output)
            rows = up if gate is None else experts.act_fn(gate) * up
        total = total.index_add(0, tokens, rows * weights[tokens, places, None])
    return total


def with_factors(experts: FusedExperts, rank: int) -> FusedExperts:
    torch.manual_seed(0)
    experts.add_lora(rank, 0.5, 0.0)
    for factor in experts.lora_B.values():
        nn.init.normal_(factor, std=0.1)
    return experts


@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 50])
def test_outputs_and_gradients_are_those_of_a_loop(tokens: int, packs: bool, rank: int) -> None:
    module = stock_module()
    experts = pack(module) if packs else FusedExperts(module.gate_up_proj, module.down_proj, module.act_fn)
    if rank:
        with_factors(experts, rank)
    hidden, index, weights = routing(tokens)
    results = []
    for run in (experts, lambda *arguments: loop(experts, *arguments)):
        inputs = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        output = run(inputs[0], index, inputs[1])
        output.square().sum().backward()
        factors = [factor for factors in (experts.lora_A, experts.lora_B) for factor in factors.values()]
        results.append([output, *(x.grad for x in (*inputs, *factors))])
        experts.zero_grad()
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, **TOLERANCE)


@pytest.mark.parametrize("rank", [0, 8])
def test_where_groups_would_make_the_host_wait_few_rows_go_through_all_experts(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = pack(stock_module())
    if rank:
        with_factors(experts, rank)
    arguments = routing(20)
    expected = experts(*arguments)
    monkeypatch.setattr(experts_module, "waits_for_groups", lambda *_: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None)
    with torch.no_grad():
        torch.testing.assert_close(experts(*arguments), expected, **TOLERANCE)


def test_which_gpus_multiply_groups_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, own=capability: own)
        found[capability] = experts_module.waits_for_groups(torch.device("cuda"), torch.bfloat16)
    assert [capability for capability, waits in found.items() if not waits] == [(9, 0), (10, 0)]
    assert not experts_module.waits_for_groups(torch.device("cpu"), torch.float32)


def test_few_tokens_unpack_their_own_experts_and_many_unpack_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = pack(stock_module())
    seen: list[list[int] | None] = []

    def unpack(weight: Any, dtype: torch.dtype, chosen: Tensor | None = None) -> Tensor:
        seen.append(None if chosen is None else chosen.tolist())
        return unpack_experts(weight, dtype, chosen)

    monkeypatch.setattr(experts_module, "unpack_experts", unpack)
    hidden, _, weights = routing(3)
    experts(hidden, torch.tensor([[6, 1], [1, 6], [1, 3]]), weights)
    assert seen == [[6, 1, 1, 6, 1, 3]] * 2
    seen.clear()
    experts(*routing(4))
    assert seen == [None, None]


@contextmanager
def counting_unpacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Returns the maximum number of kinds of matrices that are alive at a time."""
    alive: list[StorageWeakRef] = []
    most = [0]

    def unpack(*arguments: Any) -> Tensor:
        weight = unpack_experts(*arguments)
        alive[:] = [reference for reference in alive if not reference.expired()] + [
            StorageWeakRef(weight.untyped_storage())
        ]
        most[0] = max(most[0], len(alive))
        return weight

    with monkeypatch.context() as patch:
        patch.setattr(experts_module, "unpack_experts", unpack)
        yield most


def packed_model() -> Any:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(tiny_config()).requires_grad_(False)
    for _, module in stock_experts(model):
        module.packed = pack(module)
    for layer in model.model.layers:
        layer.mlp.experts = layer.mlp.experts.packed
    return model.train()


def loss_of(model: Any) -> Tensor:
    ids = torch.arange(60).view(2, 30)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    return model(inputs_embeds=embeddings, labels=ids).loss


def saved_shapes(model: Any) -> set[tuple[int, ...]]:
    """Returns the last two dimensions of the tensors that autograd saves for backward."""
    saved: set[tuple[int, ...]] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(tuple(t.shape[-2:])) or t, lambda t: t):
        loss_of(model).backward()
    return saved


EXPERT_SHAPES = {(48, 64), (64, 48), (64, 24), (24, 64)}


@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_one_kind_of_matrices_is_alive_at_a_time_and_none_is_saved(
    monkeypatch: pytest.MonkeyPatch, use_checkpointing: bool
) -> None:
    model = packed_model()
    if use_checkpointing:
        model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing == use_checkpointing
    with counting_unpacked(monkeypatch) as most:
        saved = saved_shapes(model)
    assert most[0] == 1
    assert saved
    assert not saved & EXPERT_SHAPES


def test_plain_autograd_would_keep_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def keeping(rows: Tensor, offsets: Tensor | None, unpack: Callable[[], Tensor]) -> Tensor:
        return experts_module._product(rows, unpack().transpose(1, 2), offsets)

    model = packed_model()
    monkeypatch.setattr(experts_module._PackedLinear, "apply", keeping)
    with counting_unpacked(monkeypatch) as most:
        saved = saved_shapes(model)
    assert most[0] == 2 * 3  # both kinds of all layers
    assert saved & EXPERT_SHAPES


def test_gradients_are_the_same_with_and_without_checkpointing() -> None:
    gradients = []
    for use_checkpointing in (False, True):
        model = packed_model()
        if use_checkpointing:
            model.activation_checkpointing_enable()
        embeddings = model.get_input_embeddings()(torch.arange(30)[None]).requires_grad_()
        model(inputs_embeds=embeddings, labels=torch.arange(30)[None]).loss.backward()
        gradients.append(embeddings.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_unpacked_experts_run_as_the_stock_ones() -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(tiny_config()).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert replace_experts(model) == 3 == len(fused_experts(model))
        torch.testing.assert_close(model(input_ids=ids).logits, before, **TOLERANCE)
    assert replace_experts(model) == 0


def test_sizes_whose_scales_two_experts_would_share_are_refused() -> None:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(tiny_config())
        model.model.layers[1].mlp.experts.down_proj = nn.Parameter(torch.empty(8, 30, 31))
    with pytest.raises(UserError, match="multiple of 64"):
        replace_experts(model, to_pack=True)
