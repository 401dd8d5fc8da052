"""Layers that are computed again or compiled give the same loss and gradients.

Of offloaded ones only the inputs are moved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.thinned import thinned
from vlmcap.assembly.components import add_adapters
from vlmcap.compose import compose
from vlmcap.config import LoraConfig
from vlmcap.errors import UserError
from vlmcap.models.llm import layers
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.layers import checkpoint_layers, compile_layers
from vlmcap.models.llm.load import load_language_model


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Records the shapes of tensors that are offloaded to host memory."""
    shapes: list[tuple[int, ...]] = []

    class Watched(layers.save_on_cpu):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            pack = self.pack_hook

            def note(tensor: Tensor) -> Any:
                shapes.append(tuple(tensor.shape))
                return pack(tensor)

            self.pack_hook = note

    monkeypatch.setattr(layers, "save_on_cpu", Watched)
    return shapes


def model_of(folder: Path, dropout: float = 0.1, quantization: str = "none", **lora: Any) -> Any:
    torch.manual_seed(0)
    llm = load_language_model(folder, dtype=torch.float32, quantization=quantization, attention="sdpa", device="cpu")
    return add_lora(llm, LoraConfig(rank=4, alpha=8, dropout=dropout, **lora)).train()


def loss_and_gradients(model: Any, length: int = 9) -> list[Tensor]:
    torch.manual_seed(length)  # of the dropout, which a second computation has to draw again
    embeddings = torch.randn(2, length, model.config.hidden_size, requires_grad=True)
    loss = model(inputs_embeds=embeddings, use_cache=False).logits.logsumexp(-1).sum()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, [embeddings, *weights])]


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_loss_and_gradients_are_those_of_one_computation(
    llm_folder: Path, moved: list[tuple[int, ...]], is_offloaded: bool
) -> None:
    model = model_of(llm_folder)
    expected = loss_and_gradients(model)
    checkpoint_layers(model.get_base_model(), is_offloaded=is_offloaded)
    found = loss_and_gradients(model)
    assert len(found) > 10
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-6)
    layers = model.config.num_hidden_layers if is_offloaded else 0
    assert moved == [(2, 9, model.config.hidden_size)] * layers


@pytest.mark.parametrize("num_kept", [1, 2])
def test_kept_layers_run_once_and_change_nothing(llm_folder: Path, num_kept: int) -> None:
    model = model_of(llm_folder)
    expected = loss_and_gradients(model)
    checkpoint_layers(model.get_base_model(), num_kept=num_kept)
    runs = [0] * model.config.num_hidden_layers
    for index, layer in enumerate(model.get_base_model().model.layers):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        layer.self_attn.register_forward_pre_hook(count)
    found = loss_and_gradients(model)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-6)
    again = model.config.num_hidden_layers - num_kept
    assert runs == [2] * again + [1] * num_kept


def test_nothing_is_moved_without_gradients(llm_folder: Path, moved: list[tuple[int, ...]]) -> None:
    model = model_of(llm_folder)
    checkpoint_layers(model.get_base_model(), is_offloaded=True)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 4, model.config.hidden_size), use_cache=False)
    model.eval()(inputs_embeds=torch.randn(1, 4, model.config.hidden_size, requires_grad=True), use_cache=False)
    assert not moved


def test_the_keys(llm_folder: Path, moved: list[tuple[int, ...]]) -> None:
    config = compose(
        [
            "paths.output_dir=out",
            "hardware=l4",
            "hardware.accelerator=gpu",
            "hardware.precision=fp32",
            "hardware.offload_checkpoints=true",
        ]
    )
    llm = load_language_model(llm_folder, dtype=torch.float32, quantization="none", attention="sdpa", device="cpu")
    loss_and_gradients(add_adapters(config, llm).train())
    assert moved
    with pytest.raises(
        UserError,
        match=r"hardware\.offload_checkpoints=true has no effect without hardware\.gradient_checkpointing=true",
    ):
        compose(
            [
                "paths.output_dir=out",
                "hardware=l4",
                "hardware.gradient_checkpointing=false",
                "hardware.offload_checkpoints=true",
            ]
        )


@pytest.mark.gpu
def test_the_device_holds_less(llm_folder: Path) -> None:
    peaks = []
    for is_offloaded in (False, True):
        model = model_of(llm_folder).cuda()
        checkpoint_layers(model.get_base_model(), is_offloaded=is_offloaded)
        embeddings = torch.randn(1, 400, model.config.hidden_size, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        output = model.get_base_model().model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        peaks.append(torch.cuda.memory_allocated() - before)
        output.sum().backward()
        del model, output
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("backend", thinned(["eager", "aot_eager", "inductor"], lambda backend: backend == "eager"))
def test_loss_and_gradients_are_those_of_plain_layers(llm_folder: Path, backend: str) -> None:
    plain, compiled = model_of(llm_folder, dropout=0.0), model_of(llm_folder, dropout=0.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(compiled, backend)
    for length in (9, 14, 31):
        for found, expected in zip(
            loss_and_gradients(compiled, length), loss_and_gradients(plain, length), strict=True
        ):
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] > 0, "something was compiled"
    assert counters["stats"]["unique_graphs"] <= 2, "all layers and lengths share their code"
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch._dynamo.reset()  # and what it holds, for the tests to come


COMPILED = [("4bit", True, "inductor"), ("4bit", True, "aot_eager"), ("8bit", True, "aot_eager")]
COMPILED += [("experts", True, "aot_eager"), ("experts", False, "aot_eager")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "has_checkpointing", "backend"), COMPILED)
def test_compiled_layers_go_with_packed_weights_adapters_and_checkpointing(
    kind: str, has_checkpointing: bool, backend: str, llm_folder: Path, moe_folder: Path
) -> None:
    has_experts = kind == "experts"
    folder, quantization = (moe_folder, "4bit") if has_experts else (llm_folder, kind)
    plain, compiled = (model_of(folder, 0.0, quantization, use_experts=has_experts) for _ in range(2))
    for model in (plain, compiled):
        if has_checkpointing:
            checkpoint_layers(model.get_base_model())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(compiled, backend)
    for length in (9, 14):
        for found, expected in zip(
            loss_and_gradients(compiled, length), loss_and_gradients(plain, length), strict=True
        ):
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # A checkpointed layer is compiled whole or not at all, and bitsandbytes' 8 bits and our experts are not.
    is_compiled = kind == "4bit" or not has_checkpointing
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == is_compiled
    torch._dynamo.reset()
