"""A training step and captions on a device that is not the CPU.

Nothing is mixed up, and the host waits for it a known number of times.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.checkpoints.encoders import Checkpoint
from tests.devices.claimed import CUDA, ClaimedTensor, DeviceMixError, claim, claimed_device
from tests.thinned import thinned
from vlmcap.assembly import features
from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.models.llm.adapt import base_model
from vlmcap.training.checkpoints.load import trained_parameters
from vlmcap.training.objects import Run

NEW_TOKENS = 6
USUAL = (1, 5, 0)
# Overrides of a case, and the most waits and blocking copies of a micro-batch, of a batch of prompts, and of a decoding
# step.
CASES: dict[str, tuple[list[str], tuple[int, int, int]]] = {
    "siglip": ([], USUAL),
    "clip": (["encoder=clip"], USUAL),
    "dinov3": (["encoder=dinov3_l"], USUAL),
    "internvit": (["encoder=internvit_300m"], USUAL),
    "naflex": (["encoder=siglip2_naflex", "encoder.max_patches=24"], USUAL),
    "encoder lora": (["tuning.encoder=lora"], USUAL),
    "linear": (["projector=linear"], USUAL),
    "pixel_shuffle": (["projector=pixel_shuffle"], USUAL),
    "c_abstractor": (["projector=c_abstractor", "projector.num_queries=4"], USUAL),
    "perceiver": (["projector=perceiver", "projector.num_queries=4"], USUAL),
    "cross_attention": (["projector=cross_attention", "projector.num_queries=4"], USUAL),
    "prompt queries": (["projector=cross_attention", "projector.queries=prompt"], USUAL),
    "pool": (["projector.reducer=pool", "projector.pool_size=2"], USUAL),
    "resample": (["projector.reducer=resample", "projector.resample_size=3"], USUAL),
    "merge": (["projector.reducer=merge"], USUAL),
    "saliency": (["projector.reducer=saliency"], USUAL),
    "position": (["projector.temporal=position"], USUAL),
    "temporal attention": (["projector.temporal=attention"], USUAL),
    "local_global": (["projector.temporal=local_global"], USUAL),
    "frame_stack": (["projector.frame_stack=2"], USUAL),
    "bf16": (["hardware.precision=bf16"], USUAL),
    "chunked loss": (["hardware.loss_chunk_mib=1"], USUAL),
    "packed": (["data.batching=packed", "data.max_tokens_per_batch=256"], USUAL),
    "eager": (["llm.attention=eager"], USUAL),
    "moe": (["llm=qwen3_30b_a3b", "llm.quantization=none"], USUAL),
    "moe adapters": (["llm=qwen3_30b_a3b", "llm.quantization=none", "tuning.lora.use_experts=true"], USUAL),
    "4bit": (["llm.quantization=4bit"], USUAL),
    "moe 4bit": (["llm=qwen3_30b_a3b", "llm.quantization=4bit"], USUAL),
    "beams": (["evaluation.num_beams=2"], (1, 13, 1)),
    "library": (["evaluation.engine=hf"], (1, 10, 1)),
    "penalties": (["evaluation.repetition_penalty=1.2", "evaluation.no_repeat_ngram_size=2"], USUAL),
    "speculation": (["evaluation.speculate_ngram=2"], USUAL),
    "full": (["tuning=full"], USUAL),
    "checkpointing": (["hardware.gradient_checkpointing=true"], USUAL),
    "qwen2_vl": (["model=qwen2_vl_7b"], (13, 25, 1)),
    "qwen2_5_vl": (["model=qwen2_5_vl_7b"], (23, 35, 1)),
    "qwen3_vl": (["model=qwen3_vl_8b"], (30, 36, 1)),
}
FAST = ("siglip", "naflex", "perceiver", "moe 4bit", "qwen3_vl")
FAMILIES = {"clip": "clip", "dinov3_l": "dinov3", "internvit_300m": "internvit", "siglip2_naflex": "siglip2_naflex"}


@pytest.fixture
def overrides_of(
    checkpoints: dict[str, Checkpoint],
    naflex: Checkpoint,
    llm_folder: Path,
    moe_folder: Path,
    qwen_folders: dict[str, Path],
    aihub_root: Path,
    tmp_path: Path,
) -> Callable[[list[str]], list[str]]:
    """A function from the overrides of a case to those of a tiny run on real clips."""

    def make(overrides: list[str]) -> list[str]:
        chosen = dict(override.split("=", 1) for override in overrides)
        both = [
            f"data.root={aihub_root}",
            f"paths.output_dir={tmp_path / 'run'}",
            f"paths.cache_dir={tmp_path / 'cache'}",
        ]
        both += ["hardware=cpu", "data=aihub", "data.num_frames=2", "data.eval_batch_size=2", "data.num_workers=0"]
        both += [] if "data.max_tokens_per_batch" in chosen else ["data.batch_size=2"]
        if "model" in chosen:
            kind = chosen["model"].rsplit("_", 1)[0]
            overrides = [*overrides, f"model.checkpoint={qwen_folders[kind]}", "encoder.max_patches=16"]
        else:
            family = FAMILIES.get(chosen.get("encoder", ""), "siglip")
            folder = naflex.folder if family == "siglip2_naflex" else checkpoints[family].folder
            language = moe_folder if "llm" in chosen else llm_folder
            parts = ["encoder=siglip2", "llm=qwen3_8b", "projector=mlp"]
            overrides = [*(part for part in parts if part.split("=")[0] not in chosen), *overrides]
            overrides += [f"encoder.checkpoint={folder}", f"llm.checkpoint={language}"]
            plain = {"projector.frame_stack": "1", "projector.reducer": "none", "projector.temporal": "none"}
            overrides += [f"{key}={value}" for key, value in plain.items() if key not in chosen]
        return [*both, *overrides, "llm.max_caption_tokens=64", f"llm.max_new_tokens={NEW_TOKENS}", "monitor=val/cider"]

    return make


@dataclass(frozen=True)
class Result:
    """What a step and captions gave.

    Attributes:
        numbers: The loss, and the norm of the gradients.
        captions: Of the prompts.
        waits: By the operation, of a micro-batch, of a batch of prompts, and of a decoding step.
    """

    numbers: list[float]
    captions: list[str]
    waits: tuple[Counter[str], Counter[str], Counter[str]]


def step_and_captions(run: Run, device: torch.device, counts: Counter[str]) -> Result:
    """A micro-batch forth and back, and captions of a batch of prompts, as the loop computes them."""
    module, plugin = run.module, cast("Any", run.trainer.precision_plugin)
    batch, prompts = (
        module.transfer_batch_to_device(next(iter(loader)), device, 0)
        for loader in (run.data.train_dataloader(), run.data.prompt_loader("test"))
    )
    module.train()
    counts.clear()
    with plugin.train_step_context():
        loss = module.training_step(batch, 0)
    loss.backward()
    of_batch = counts.copy()
    gradients = [p.grad.float().norm() for part in module.trained.values() for p in part.values() if p.grad is not None]
    numbers = [loss.item(), torch.stack(gradients).norm().item()]
    calls: list[Counter[str]] = []  # what had been counted when the language model was called
    handle = base_model(module.captioner.llm).register_forward_pre_hook(lambda *_: calls.append(counts.copy()))
    module.eval()
    counts.clear()
    with plugin.test_step_context(), torch.no_grad():
        captions = module.test_step(prompts, 0)
    handle.remove()
    assert len(calls) > 1, "the captions ended with their first tokens; choose other weights"
    # A step in which no caption ends: the next one would take its row.
    steps = [later - earlier for earlier, later in itertools.pairwise(calls[1:])] or [Counter[str]()]
    return Result(numbers, captions, (of_batch, calls[1], min(steps, key=Counter.total)))


@pytest.mark.parametrize("name", thinned(CASES, lambda name: name in FAST))
def test_a_step_and_captions_are_those_of_the_cpu_with_few_waits(
    name: str, overrides_of: Callable[[list[str]], list[str]], make_run: Callable[[Config], Run]
) -> None:
    torch.manual_seed(0)
    run = make_run(compose(overrides_of(CASES[name][0])))
    captioner = run.module.captioner
    expected = step_and_captions(run, torch.device("cpu"), Counter())
    for parameter in captioner.parameters():
        parameter.grad = None
    with claimed_device() as counts:
        claim(captioner)
        run.module.trained = trained_parameters(captioner, run.module.plan)
        found = step_and_captions(run, CUDA, counts)
        chosen = run.module.configure_optimizers()  # the scheduler has to outlive the step
        chosen["optimizer"].step()
    # Run with `-s` for the table.
    columns = (
        f"{sum(c.values()):3} ({', '.join(f'{key} {count}' for key, count in sorted(c.items()))})" for c in found.waits
    )
    print(f"\n{name:20}", *columns, sep=" | ")
    assert found.numbers == pytest.approx(expected.numbers, rel=1e-5)
    assert found.captions == expected.captions
    for kind, counted, most in zip(
        ("micro-batch", "batch of prompts", "decoding step"), found.waits, CASES[name][1], strict=True
    ):
        assert sum(counted.values()) <= most, f"host waits a {kind}: {dict(counted)}"


def test_frames_to_encode_go_through_pinned_memory(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, frames = checkpoints["siglip"].load(-1), torch.randint(0, 256, (2, 2, 3, 56, 56), dtype=torch.uint8)
    expected, pinned = encoder(frames), []
    monkeypatch.setattr(features, "device_of", lambda config: "cuda:0")
    monkeypatch.setattr(encoder, "to", lambda device: encoder)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tuple(tensor.shape)) or tensor)
    with claimed_device() as counts:
        claim(encoder)
        found = features.encoding_of(compose(["paths.output_dir=out", "hardware=cpu"]), encoder)(frames, None)
        assert not counts and pinned == [tuple(frames.shape)]
        assert torch.equal(found.cpu(), expected)


def test_what_a_gpu_refuses_is_refused_and_waits_are_counted() -> None:
    with claimed_device() as counts:
        there, here = torch.arange(4.0, device=CUDA), torch.arange(4.0)
        assert isinstance(there, ClaimedTensor)
        assert (there.device, there.is_cuda) == (CUDA, True)
        assert isinstance(there * torch.tensor(2.0), ClaimedTensor)
        assert not counts
        with pytest.raises(DeviceMixError, match="CPU tensor of shape"):
            there + here
        with pytest.raises(DeviceMixError):
            here[there.long()]
        with pytest.raises(DeviceMixError):
            there.numpy()
        assert there.tolist() == there.cpu().tolist() == [0, 1, 2, 3]
        assert bool(there[1] == 1) and there[there > 1].shape == (2,)
        assert isinstance(torch.tensor([1], device=CUDA), ClaimedTensor)
    assert counts == {"tolist": 1, "download": 1, "_local_scalar_dense": 1, "boolean index": 1, "upload": 1}
