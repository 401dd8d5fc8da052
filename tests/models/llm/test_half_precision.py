"""float16 as on a T4: a float32 projector, a 16-bit language model and loss scaling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmcap.config import LlmConfig, LoraConfig, MlpConfig, Temporal
from vlmcap.data.loading.collate import Collator
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.types import Batch, Clip, Sample

MAX = torch.finfo(torch.float16).max


def captioner(folder: Path, quantization: str) -> VideoCaptioner:
    torch.manual_seed(0)
    llm = load_language_model(folder, dtype=torch.float16, quantization=quantization, attention="sdpa", device="cpu")
    adapted = add_lora(llm, LoraConfig(rank=4, alpha=8))
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."))
    projector = build_projector(
        MlpConfig(temporal=Temporal.none), ProjectorSizes(in_dim=32, out_dim=64, grid=(2, 2), num_frames=2)
    )
    return VideoCaptioner(None, projector, adapted, prompt, GenerationSettings(max_new_tokens=4))


def batch_of(model: VideoCaptioner) -> Batch:
    """Features near the largest float16 number, so that sums over their width overflow."""
    features = (torch.randn(2, 2, 4, 32) * 1e4 + 2e4).clamp(-6e4, 6e4).half()
    clips = [
        Clip(str(i), Path(f"{i}.mp4"), (caption,))
        for i, caption in enumerate(("푸른 바다 위로 해가 떠오른다.", "산이다."))
    ]
    return Collator(model.prompt, 8, 50)(
        [Sample(clip, features=row) for clip, row in zip(clips, features, strict=True)]
    )


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_large_features_train_with_loss_scaling(llm_folder: Path, quantization: str) -> None:
    model = captioner(llm_folder, quantization)
    batch = batch_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)  # starts too high, as it may in practice
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.float16):
            loss, count = model(batch)
        losses.append(float(loss.detach()) / count)
        scaler.scale(loss / count).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(torch.tensor(losses).isfinite())
    assert scaler.get_scale() < 2.0**28  # steps were skipped, not spoilt
    assert losses[-1] < losses[0] - 0.05
    assert all(p.isfinite().all() for p in trained)


def test_in_float16_such_a_projector_overflows(llm_folder: Path) -> None:
    """Otherwise the test above would be vacuous."""
    model = captioner(llm_folder, "none")
    features = batch_of(model).features
    assert features is not None
    assert features.isfinite().all()
    linear = next(module for module in model.projector.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        linear.weight.abs_()
        assert not F.linear(features, linear.weight.half(), linear.bias.half()).isfinite().all()
        assert model.projector(features).isfinite().all()
