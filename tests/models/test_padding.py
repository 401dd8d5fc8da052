"""Right-padded training batches need no mask: loss and gradients are the same as with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.pretrained.test_load import KINDS, adapted, load
from tests.models.test_packing import OPTIONS, Make, collate, loss_and_gradients, make, samples
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.llm.adapt import base_model
from vlmcap.models.llm.attention import is_causal
from vlmcap.types import Batch

__all__ = ["make"]
# Other classes of transformers that llm=custom takes: windows, soft caps of the logits, and a layer that is recurrent.
OTHERS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {"pad_token_id": 0},
    "granite": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "smollm3": {"pad_token_id": 0},
}
Call = tuple[bool, bool]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Records for each SDPA call whether its causal flag is set and whether it has a mask."""
    seen: list[Call] = []
    attend = F.scaled_dot_product_attention

    def noted(*arguments: Any, **named: Any) -> Tensor:
        seen.append((bool(named.get("is_causal")), named.get("attn_mask") is not None))
        return attend(*arguments, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    yield seen


def assert_same_without_a_mask(captioner: VideoCaptioner, batch: Batch, tolerance: float = 1e-6) -> None:
    assert batch.is_right_padded and batch.attention_mask.min() == 0
    assert captioner.language_mask(batch) is None
    without = loss_and_gradients(captioner, batch)
    masked = dataclasses.replace(batch, is_right_padded=False)
    assert captioner.language_mask(masked) is batch.attention_mask
    expected = loss_and_gradients(captioner, masked)
    assert without[1] == expected[1]
    assert without[0] == pytest.approx(expected[0], rel=1e-6)
    assert len(expected[2]) > 10
    for own, other in zip(without[2], expected[2], strict=True):
        assert float((own - other).norm()) <= tolerance * max(1.0, float(other.norm()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_loss_and_gradients_are_those_with_a_mask(kind: str, attention: str, make: Make) -> None:
    captioner = make(kind, attention)
    assert_same_without_a_mask(captioner, collate(captioner, samples(5), is_packed=False))


@pytest.mark.parametrize("kind", KINDS)
def test_those_of_whole_models_too(kind: str, qwen_folders: dict[str, Path]) -> None:
    captioner, batch = adapted(load(qwen_folders[kind]), qwen_folders[kind])
    with torch.no_grad():
        for name, parameter in captioner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert_same_without_a_mask(captioner.eval(), batch)


@pytest.mark.parametrize("kind", OTHERS)
def test_those_of_other_classes_too(kind: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, kind, OTHERS[kind])
    captioner = make(kind)
    assert_same_without_a_mask(captioner, collate(captioner, samples(5), is_packed=False), tolerance=5e-6)


@pytest.mark.parametrize("kind", OPTIONS)
def test_attention_is_causal_by_its_flag_where_a_layer_has_no_window(kind: str, make: Make, calls: list[Call]) -> None:
    captioner = make(kind)
    captioner(collate(captioner, samples(5), is_packed=False))
    windowed = (False, True)  # keys beyond the window need a mask of their own
    assert calls == [windowed if kind == "exaone4" else (True, False), (True, False)]


@pytest.mark.parametrize("kind", KINDS)
def test_that_of_whole_models_is_too(kind: str, qwen_folders: dict[str, Path], calls: list[Call]) -> None:
    captioner, batch = adapted(load(qwen_folders[kind]), qwen_folders[kind])
    embeddings = captioner.language_inputs(batch, captioner.visual_tokens(batch))
    calls.clear()  # of the vision tower
    captioner.llm(**embeddings, use_cache=False)
    assert set(calls) == {(True, False)}


def test_padding_on_the_left_and_rows_of_many_clips_stay_as_they_are(make: Make, calls: list[Call]) -> None:
    captioner = make("qwen3")
    left = dataclasses.replace(collate(captioner, samples(5), is_packed=False), is_right_padded=False)
    packed = collate(captioner, samples(5), is_packed=True)
    for batch in (left, packed):
        captioner(batch)
    assert set(calls) == {(False, True)}


def test_attention_that_looks_ahead_keeps_the_mask(make: Make) -> None:
    captioner = make("qwen3")
    batch = collate(captioner, samples(5), is_packed=False)
    model: Any = base_model(captioner.llm)
    model.model.layers[1].self_attn.is_causal = False
    seeing = VideoCaptioner(None, captioner.projector, captioner.llm, captioner.prompt, captioner.generation)
    assert seeing.language_mask(batch) is batch.attention_mask
    assert not is_causal(nn.Linear(2, 2)), "layers that say nothing may look ahead"
