"""A language model of any size, for a training step with fake tensors and the same step with real ones."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vlmcap.config import LoraConfig
from vlmcap.measuring.memory_use import reset_peak, resident_bytes
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.layers import checkpoint_layers
from vlmcap.planning.estimate.sizes import language_batch
from vlmcap.planning.estimate.stages import StageMemory, find_blocks, profile_stage


@dataclass(frozen=True, slots=True)
class Trial:
    """A language model and its batch.

    Attributes:
        kind: Model type of transformers.
        width: Width of the hidden states.
        vocabulary: Size of the vocabulary.
        quantization: "none", "8bit" or "4bit".
        has_checkpointing: Whether activations are checkpointed.
        num_clips: Clips in the batch.
        num_visual: Visual tokens per clip.
        num_caption: Caption tokens per clip.
        num_kept: Number of last blocks that are not recomputed.
        is_offloaded: Whether inputs of recomputed blocks wait in host memory.
    """

    kind: str
    width: int
    vocabulary: int = 500
    quantization: str = "none"
    has_checkpointing: bool = True
    num_clips: int = 1
    num_visual: int = 96
    num_caption: int = 24
    num_kept: int = 0
    is_offloaded: bool = False


def build_trial(trial: Trial, depth: int) -> nn.Module:
    """Builds the model in float32 with random weights, or without weights under `torch.device("meta")`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = max(2, trial.width // 64)
    values: dict[str, Any] = (
        {"head_dim": 64, "num_key_value_heads": heads // 2} if trial.kind.startswith("qwen3") else {}
    )
    if trial.kind.endswith("moe"):
        values |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": trial.width}
    config = AutoConfig.for_model(
        trial.kind,
        vocab_size=trial.vocabulary,
        hidden_size=trial.width,
        intermediate_size=3 * trial.width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        **values,
    )
    llm: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    return llm


def _adapted(trial: Trial, llm: nn.Module) -> nn.Module:
    if trial.has_checkpointing:
        checkpoint_layers(llm, is_offloaded=trial.is_offloaded, num_kept=trial.num_kept)
    adapted: nn.Module = add_lora(llm, LoraConfig(rank=8, alpha=16))
    return adapted.train()


def _captioner(trial: Trial, llm: nn.Module, visual: Tensor) -> VideoCaptioner:
    prompt: Any = SimpleNamespace(question_ids=[1])
    projector: Any = nn.Identity()
    settings: Any = None
    captioner = VideoCaptioner(None, projector, llm, prompt, settings)
    captioner.encode = lambda batch: visual  # type: ignore[method-assign]
    captioner.project = lambda batch, features: features.flatten(0, 1)  # type: ignore[method-assign]
    return captioner


def profile_trial(trial: Trial, depth: int) -> StageMemory:
    """Profiles the training step with fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vlmcap.planning.estimate.fake_tensors import emulate_checkpoint_offload, fill_with_fake_tensors, quantize_fake

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        llm = build_trial(trial, depth)
        quantize_fake(llm, trial.quantization, torch.float32)
        llm = _adapted(trial, llm)
    if trial.is_offloaded:
        emulate_checkpoint_offload(llm)
    fill_with_fake_tensors(llm, mode)
    with mode:
        visual = torch.empty(trial.num_clips, trial.num_visual, trial.width, requires_grad=True)
    captioner = _captioner(trial, llm, visual)
    batch = language_batch([trial.num_caption] * trial.num_clips, [trial.num_visual], 8)
    blocks = list(find_blocks(base_model(llm), depth))
    return profile_stage(
        llm,
        lambda: captioner(batch)[0],
        mode=mode,
        blocks=blocks,
        inputs=[visual],
        dtype=None,
        num_kept=trial.num_kept,
    )


def peak_of_real_step(trial: Trial, depth: int) -> float:
    """Returns the bytes that a real step on the CPU adds to the resident set; needs a fresh process.

    A step on two tokens comes first, so that threads and kernels are there.
    """
    torch.manual_seed(0)
    llm = _adapted(trial, build_trial(trial, depth))
    visual = torch.randn(trial.num_clips, trial.num_visual, trial.width, requires_grad=True)
    _captioner(trial, llm, visual[:1, :1].detach().requires_grad_())(language_batch([2], [1], 8))[0].backward()
    llm.zero_grad(set_to_none=True)
    captioner, batch = (
        _captioner(trial, llm, visual),
        language_batch([trial.num_caption] * trial.num_clips, [trial.num_visual], 8),
    )
    reset_peak()
    before = resident_bytes("VmRSS")
    captioner(batch)[0].backward()
    return resident_bytes("VmHWM") - before


def peak_on_gpu(trial: Trial, depth: int, device: torch.device) -> float:
    """Returns the bytes that PyTorch's allocator hands out in a real step on a GPU, beside the weights.

    A short step comes first here, too.
    """
    torch.manual_seed(0)
    llm = _adapted(trial, build_trial(trial, depth)).to(device)
    visual = torch.randn(trial.num_clips, trial.num_visual, trial.width, device=device, requires_grad=True)
    short = language_batch([2], [1], 8).to(device)
    _captioner(trial, llm, visual[:1, :1].detach().requires_grad_())(short)[0].backward()
    llm.zero_grad(set_to_none=True)
    captioner, batch = (
        _captioner(trial, llm, visual),
        language_batch([trial.num_caption] * trial.num_clips, [trial.num_visual], 8).to(device),
    )
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    captioner(batch)[0].backward()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)
