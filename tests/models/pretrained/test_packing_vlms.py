"""Clips of a pretrained VLM packed into one row have the loss and gradients of a row each, and no clip sees another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.checkpoints.pretrained import CASES, SIDE, VISION
from tests.models.test_packing import flash_like, loss_and_gradients
from tests.thinned import thinned
from vlmcap.config import LlmConfig, LoraConfig
from vlmcap.data.loading.collate import Collator, flat_indices
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.attention import PACKABLE_VLMS, check_packing
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.pretrained import load_pretrained
from vlmcap.models.pretrained.families import FAMILIES
from vlmcap.types import Batch, Clip, Sample

KINDS = (*(kind for kind in CASES if not FAMILIES[CASES[kind][0]].is_bidirectional), "llava_next_video", *VISION)
CAPTIONS = (
    "산이다.",
    "푸른 바다 위로 아침 해가 천천히 떠오른다.",
    "눈 내리는 밤의 궁궐이 푸른 바다 위로 떠오른다.",
    "해",
)
SIZES = ((84, 112), (128, 56), (56, 56), (84, 112))  # pixels of clips that keep their aspect ratio
TIMES_S = ((0.5, 1.5, 2.5, 3.5), (1.5, 4.5, 7.5, 10.5), (0.0, 0.1, 0.2, 0.3), (2.0, 3.0, 4.0, 5.0))


class Setup:
    """A captioner with adapters that have learned something, and batches of its clips."""

    def __init__(self, folder: Path, *, has_grid: bool) -> None:
        self.has_grid = has_grid  # whether frames keep their aspect ratio
        options: dict[str, Any] = {"dtype": torch.float32, "quantization": "none", "device": "cpu", "max_patches": 64}
        self.parts = load_pretrained(folder, attention="sdpa", **options)
        around = {"visual_prefix": self.parts.visual_prefix, "visual_suffix": self.parts.visual_suffix}
        prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."), **around)
        torch.manual_seed(0)
        llm = add_lora(self.parts.llm, LoraConfig(rank=4, alpha=8))
        with torch.no_grad():
            for name, parameter in llm.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        encoder, projector = self.parts.encoder, self.parts.projector
        made = self.parts.captioner_class(encoder, projector, llm, prompt, GenerationSettings(4))
        self.captioner: VideoCaptioner = made.eval()

    def samples(self) -> list[Sample]:
        """Clips of several grids, lengths, times and captions, where the model has them."""
        transform, found = self.parts.encoder.transform, []
        for row, (caption, size) in enumerate(zip(CAPTIONS, SIZES, strict=True)):
            frames = (2 if row == 1 else 4) if self.has_grid else 3
            shape = (frames, 3, *(size if self.has_grid else (SIDE, SIDE)))
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(row))
            clip = Clip(str(row), f"{row}.mp4", (caption,))
            grid = transform.grid_thw(frames, *size) if self.has_grid else None
            times_s = TIMES_S[row][:frames] if self.has_grid else None
            found.append(Sample(clip, frames=transform(pixels), grid_thw=grid, times_s=times_s))
        return found

    def batch(self, *, is_packed: bool) -> Batch:
        grid = (2 if self.has_grid else 3, *self.parts.encoder.grid)
        return Collator(self.captioner.prompt, self.parts.layout(grid), 200, is_packed=is_packed)(self.samples())


SLOW = ("varco_vision_2", "llava", "qwen2_vl", "hyperclovax_vision_v2")  # packed like another one


@pytest.fixture(scope="module", params=thinned(KINDS, lambda kind: kind not in SLOW))
def setup(
    request: pytest.FixtureRequest,
    qwen_folders: dict[str, Path],
    frames_folder: Callable[[str], Path],
    llava_folder: Path,
) -> Setup:
    kind = request.param
    if kind in VISION:
        return Setup(qwen_folders[kind], has_grid=True)
    return Setup(frames_folder(kind) if kind in CASES else llava_folder, has_grid=False)


def test_every_family_is_tried() -> None:
    tried = {CASES[kind][0] if kind in CASES else kind for kind in KINDS}
    assert tried == {name for name, family in FAMILIES.items() if not family.is_bidirectional}


def assert_alike(setup: Setup) -> tuple[float, float]:
    """Returns the differences of the loss and of the gradients from those of a row each, relative to these."""
    rows, packed = (setup.batch(is_packed=is_packed) for is_packed in (False, True))
    assert packed.input_ids.shape == (1, int(rows.attention_mask.sum()))
    loss, count, gradients = loss_and_gradients(setup.captioner, rows)
    own_loss, own_count, own_gradients = loss_and_gradients(setup.captioner, packed)
    assert own_count == count == packed.num_label_tokens
    assert len(gradients) > 10
    for own, expected in zip(own_gradients, gradients, strict=True):
        # 2.8e-5 for the gates of Qwen3.5 (5e-15 in float64), whose gradients are sums of opposite terms
        assert float((own - expected).norm()) <= 1e-4 * float(expected.norm())
    own_all, expected_all = (torch.cat([one.flatten() for one in all_of]) for all_of in (own_gradients, gradients))
    error, gradient_error = abs(own_loss - loss) / loss, float((own_all - expected_all).norm() / expected_all.norm())
    assert error < 1e-5
    assert gradient_error < 1e-5
    return error, gradient_error


def test_a_packed_row_has_the_loss_and_gradients_of_a_row_each(
    setup: Setup, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    error, gradient_error = assert_alike(setup)
    record_property("packing:" + request.node.callspec.params["setup"], f"{error:.1e} {gradient_error:.1e}")


def test_with_gradient_checkpointing_too(setup: Setup) -> None:
    llm: Any = base_model(setup.captioner.llm)
    setup.captioner.train()
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        assert_alike(setup)
    finally:
        llm.gradient_checkpointing_disable()
        setup.captioner.eval()


def test_no_clip_sees_another(setup: Setup) -> None:
    captioner, batch = setup.captioner, setup.batch(is_packed=True)
    with torch.no_grad():
        features = captioner.encode(batch).requires_grad_()
    batch = replace(batch, frames=None, features=features)
    assert batch.position_ids is not None
    assert batch.labels is not None
    owner = (batch.position_ids == 0).cumsum(1) - 1
    for clip in range(len(batch)):
        only = replace(batch, **flat_indices(batch.visual_mask, batch.labels.masked_fill(owner != clip, -100)))
        (gradient,) = torch.autograd.grad(captioner(only)[0], features)
        assert gradient.flatten(1).any(1).tolist() == [other == clip for other in range(len(batch))]


@torch.no_grad()
def test_attention_without_a_mask_is_told_the_borders(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model: Any = base_model(setup.captioner.llm)
    expected = setup.captioner(setup.batch(is_packed=False))[0].item()
    function = Mock(side_effect=flash_like)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_like", function)
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation", "flash_like")
    assert setup.captioner(setup.batch(is_packed=True))[0].item() == pytest.approx(expected, rel=1e-5)
    assert function.called


def test_packed_models_are_those_that_are_tried(qwen_folders: dict[str, Path]) -> None:
    assert set(PACKABLE_VLMS) == {name for name, family in FAMILIES.items() if "mrope" in family.kind}
    for folder in qwen_folders.values():
        check_packing(folder, "model=custom", is_vlm=True)


def test_a_model_that_attends_in_both_directions_is_refused(frames_folder: Callable[[str], Path]) -> None:
    kinds = [kind for kind, case in CASES.items() if FAMILIES[case[0]].is_bidirectional]
    assert kinds
    for kind in kinds:
        with pytest.raises(UserError, match=r"data\.batching=packed .* set data\.batching=by_length"):
            check_packing(frames_folder(kind), "model=custom", is_vlm=True)
