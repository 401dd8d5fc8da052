"""Checks where weights are: read straight to the GPU, and still there when a fit ends."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import limits
from benchmarks.gpu.counting import wait, watching_host
from benchmarks.gpu.models import Prepared, prepare, require_gpu, training, training_batch
from benchmarks.gpu.registry import Place
from benchmarks.gpu.rows import Report
from vlmcap.config import Precision
from vlmcap.measuring.steps import batch_loader
from vlmcap.planning.hardware import GIB
from vlmcap.types import Batch

_LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 12,
    "vocab_size": 32_000,
}  # about 0.7 billion weights
_SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 500}


def unquantised(report: Report, place: Place) -> None:
    """Loads a Qwen3 of 1.4 GiB in bfloat16 from disk."""
    from vlmcap.models.llm.load import load_language_model

    require_gpu(place, 4, Precision.bf16)
    folder = _saved(place)
    _load(load_language_model, folder, place)  # kernels, the context, and what libraries import on first use
    before = torch.cuda.memory_allocated() if place.device == "cuda" else 0
    with watching_host() as host:
        llm = _load(load_language_model, folder, place)
    size = sum(parameter.numel() * parameter.element_size() for parameter in llm.parameters())
    allocated = (torch.cuda.memory_allocated() if place.device == "cuda" else size) - before
    report.add("Qwen3", "weights, GiB", size / GIB)
    report.add("Qwen3", "memory of the GPU over weights", allocated / size, limits.ON_DEVICE)
    report.add("Qwen3", "host memory grown over weights", host.grown_gib * GIB / size, limits.HOST)
    devices = [parameter.device.type for parameter in llm.parameters()]
    report.add("Qwen3", "share of weights on the device", devices.count(place.device) / len(devices), limits.ALL)
    with torch.no_grad():
        logits = llm(torch.arange(16, device=place.device)[None]).logits
    report.add("Qwen3", "logits are numbers", bool(logits.isfinite().all()), limits.ALL)


def _load(read: Any, folder: Path, place: Place) -> Any:
    gc.collect()
    device = "cuda:0" if place.device == "cuda" else "cpu"
    llm = read(folder, dtype=torch.bfloat16, quantization="none", attention="sdpa", device=device)
    wait(place.device)
    return llm


def _saved(place: Place) -> Path:
    """Saves a checkpoint in Hugging Face layout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = _SMALL if place.is_tiny else _LARGE
    heads = sizes["hidden_size"] // 64
    config = AutoConfig.for_model(
        "qwen3",
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(place.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place.folder / "llm")
    return place.folder / "llm"


def teardown_8bit(report: Report, place: Place) -> None:
    """Compares four layers of Qwen3-8B in 8 bits before and after a fit."""
    prepared = prepare(place, "teardown_8bit", ["llm.quantization=8bit"])
    captioner: Any = prepared.captioner
    rng = random.Random(0)
    batches = [training_batch(prepared, rng, is_longest=True) for _ in range(2)]
    fit(prepared, place, batches)  # what libraries load and allocate on first use does not count
    weights = {name: parameter for name, parameter in captioner.named_parameters() if parameter.dtype == torch.int8}
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    with watching_host() as host:
        trainer, module = fit(prepared, place, batches)
    devices = [parameter.device.type for parameter in captioner.parameters()]
    size = sum(parameter.numel() * parameter.element_size() for parameter in captioner.parameters())
    report.add("after a fit", "weights in 8 bits", len(weights))
    report.add("after a fit", "share of weights on the device", devices.count(place.device) / len(devices), limits.ALL)
    changed = sum(not torch.equal(before[name], parameter) for name, parameter in weights.items())
    report.add("after a fit", "frozen weights that changed", changed, limits.SAME)
    report.add("after a fit", "host memory grown over weights", host.grown_gib * GIB / size, limits.HOST)
    losses = [_loss(module, trainer, batches[0].to(captioner.device)) for _ in range(2)]
    report.add("after a fit", "a loss twice, difference", abs(losses[0] - losses[1]), limits.SAME)


def fit(prepared: Prepared, place: Place, batches: Sequence[Batch]) -> tuple[Any, Any]:
    """Trains a step for each batch, and returns the trainer and its module."""
    trainer, module = training(prepared, place, [], len(batches), 1)
    trainer.fit(module, train_dataloaders=batch_loader(batches, is_on_gpu=place.device == "cuda"))
    wait(place.device)
    return trainer, module


def _loss(module: Any, trainer: Any, batch: Any) -> float:
    module.eval()
    with trainer.precision_plugin.val_step_context(), torch.no_grad():
        loss, count = module.captioner(batch)
    return float(loss) / int(count)
