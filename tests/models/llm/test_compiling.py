"""Compiled layers give the loss and gradients of plain ones, at any length, and keep their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.compiling import compile_layers
from vlmcap.models.llm.load import load_language_model


def model_of(folder: Path) -> Any:
    torch.manual_seed(0)
    llm = load_language_model(folder, dtype=torch.float32, quantization="none", attention="sdpa", device="cpu")
    return add_lora(llm, rank=4, alpha=8, dropout=0.0, target_modules="all-linear").train()


def loss_and_gradients(model: Any, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    embeddings = torch.randn(2, length, model.config.hidden_size, generator=generator).requires_grad_()
    loss = model(inputs_embeds=embeddings, use_cache=False).logits.logsumexp(-1).sum()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, [embeddings, *weights])]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_plain_layers(llm_folder: Path, backend: str) -> None:
    plain, compiled = model_of(llm_folder), model_of(llm_folder)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(compiled, backend)
    for length in (9, 14, 31):
        for found, expected in zip(loss_and_gradients(compiled, length), loss_and_gradients(plain, length), strict=True):
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] > 0, "something was compiled"
    assert counters["stats"]["unique_graphs"] <= 2, "all layers and lengths share their code"
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch._dynamo.reset()  # and what it holds, for the tests to come
