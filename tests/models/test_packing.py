"""Loss and gradients of clips packed into one row equal those of one row per clip, and no clip sees another."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcap.config import LlmConfig, LoraConfig, MlpConfig, Temporal
from vlmcap.data.loading.collate import Collator, flat_indices
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.known import known_checkpoints, known_config
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.attention import PACKABLE, check_packing
from vlmcap.models.llm.prompt import VisualRun, load_prompt
from vlmcap.models.pretrained.families import FAMILIES
from vlmcap.models.projectors import ProjectorSizes, build_projector, count_tokens
from vlmcap.types import Batch, Clip, Sample

WORDS = ("푸른", "바다", "위로", "아침", "해가", "천천히", "떠오른다", "눈", "내리는", "밤의", "궁궐이")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
# What tells a class apart: scales of HyperCLOVA X, and the two kinds of EXAONE 4, one with windows and layers without
# positions.
OPTIONS: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4-full": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "hyperclovax": {
        "logits_scaling": 0.5,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
    },
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
}
Make = Callable[..., VideoCaptioner]


@pytest.fixture
def make(llm_folder: Path) -> Make:
    """Builds a captioner around a tiny language model with non-zero adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    prompt = load_prompt(llm_folder, LlmConfig(prompt="설명해 주세요."))

    def build(kind: str, attention: str = "sdpa") -> VideoCaptioner:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind.partition("-")[0], vocab_size=len(prompt.tokenizer), **(SIZES | OPTIONS[kind])
        )
        llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)
        adapted = add_lora(llm, LoraConfig(rank=4, alpha=8))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        projector = build_projector(
            MlpConfig(temporal=Temporal.none), ProjectorSizes(in_dim=8, out_dim=64, grid=(1, 2), num_frames=3)
        )
        return VideoCaptioner(None, projector, adapted, prompt, GenerationSettings(4)).eval()

    return build


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Clips of 1 to 3 frames with captions of 1 to 20 words, and one of a single word."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [1] + [rng.randint(1, 20) for _ in range(count - 1)]
    found = []
    for index, length in enumerate(lengths):
        frames = rng.randint(1, 3)
        clip = Clip(str(index), f"{index}.mp4", (" ".join(rng.choices(WORDS, k=length)),))
        found.append(Sample(clip, features=torch.randn(frames, 2, 8, generator=generator), grid_thw=(frames, 1, 2)))
    return found


def collate(captioner: VideoCaptioner, items: list[Sample], *, is_packed: bool) -> Batch:
    visual = VisualRun(partial(count_tokens, captioner.projector.config, captioner.projector.sizes), (3, 1, 2))
    return Collator(captioner.prompt, visual, 200, is_packed=is_packed)(items)


def loss_and_gradients(captioner: VideoCaptioner, batch: Batch) -> tuple[float, int, list[Tensor]]:
    weights = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    loss, count = captioner(batch)
    return loss.item(), count, list(torch.autograd.grad(loss, weights))


def assert_alike(captioner: VideoCaptioner, items: list[Sample]) -> None:
    rows, packed = (collate(captioner, items, is_packed=is_packed) for is_packed in (False, True))
    assert packed.input_ids.shape == (1, int(rows.attention_mask.sum()))
    (loss, count, gradients), (packed_loss, packed_count, packed_gradients) = (
        loss_and_gradients(captioner, batch) for batch in (rows, packed)
    )
    assert packed_count == count == packed.num_label_tokens
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert len(gradients) > 10
    for gradient, expected in zip(packed_gradients, gradients, strict=True):
        assert float((gradient - expected).norm()) <= 5e-6 * float(expected.norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_packed_row_has_the_loss_and_gradients_of_a_row_each(kind: str, attention: str, make: Make) -> None:
    captioner = make(kind, attention)
    for seed, count in enumerate((1, 2, 7)):
        assert_alike(captioner, samples(count, seed))


@pytest.mark.parametrize("kind", OPTIONS)
def test_with_gradient_checkpointing_too(kind: str, make: Make) -> None:
    captioner = make(kind).train()
    base_model(captioner.llm).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    assert_alike(captioner, samples(4))


@pytest.mark.parametrize("kind", OPTIONS)
def test_no_clip_sees_another(kind: str, make: Make) -> None:
    captioner, items = make(kind), samples(4)
    batch = collate(captioner, items, is_packed=True)
    assert batch.position_ids is not None
    assert batch.labels is not None
    assert batch.features is not None
    batch.features.requires_grad_()
    owner = (batch.position_ids == 0).cumsum(1) - 1
    for clip in range(len(items)):
        only = dataclasses.replace(
            batch, **flat_indices(batch.visual_mask, batch.labels.masked_fill(owner != clip, -100))
        )
        loss, count = captioner(only)
        assert count > 0
        (gradient,) = torch.autograd.grad(loss, batch.features)
        assert gradient.flatten(1).any(1).tolist() == [
            other == clip for other in range(len(items))
        ]  # exactly zero elsewhere
        changed = batch.input_ids.masked_fill((owner != clip) & ~batch.visual_mask, 7)
        assert captioner(dataclasses.replace(only, input_ids=changed))[0].item() == pytest.approx(loss.item(), rel=1e-6)


def flash_like(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention without a mask that separates clips by positions, as FlashAttention does for one row."""
    positions = arguments["position_ids"]
    assert attention_mask is None
    assert positions.shape == (1, query.shape[2])
    owner, place = (positions[0] == 0).cumsum(0), torch.arange(positions.shape[1])
    distance = place[:, None] - place
    mask = (owner[:, None] == owner) & (distance >= 0) & (distance < (arguments.get("sliding_window") or math.inf))
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, scale=arguments["scaling"]).transpose(1, 2), None


@pytest.fixture
def flash_name() -> Iterator[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["flash_like"] = flash_like
    yield "flash_like"
    del ALL_ATTENTION_FUNCTIONS["flash_like"]


@pytest.mark.parametrize("kind", OPTIONS)
def test_attention_without_a_mask_is_told_the_borders(kind: str, make: Make, flash_name: str) -> None:
    items = samples(5)
    captioner = make(kind)
    expected = loss_and_gradients(captioner, collate(captioner, items, is_packed=False))
    base_model(captioner.llm).config._attn_implementation = flash_name  # type: ignore[union-attr]
    found = loss_and_gradients(captioner, collate(captioner, items, is_packed=True))
    assert found[:2] == (pytest.approx(expected[0], rel=1e-6), expected[1])


def test_nothing_of_the_clip_before_predicts_a_first_token(make: Make) -> None:
    """Without prompt and visual tokens, the first token of a caption directly follows the last one of another clip."""
    captioner = make("qwen3")
    bare = dataclasses.replace(captioner.prompt, prefix_ids=[], suffix_ids=[])
    captioner.project = lambda _batch, _features: torch.zeros(0, 64)  # type: ignore[method-assign]
    items = [dataclasses.replace(item, grid_thw=None) for item in samples(3)]
    rows, packed = (Collator(bare, 0, 200, is_packed=is_packed)(items) for is_packed in (False, True))
    assert rows.num_label_tokens == packed.num_label_tokens == packed.input_ids.shape[1] - 3
    (loss, count), (packed_loss, packed_count) = captioner(rows), captioner(packed)
    assert packed_count == count == packed.num_label_tokens
    assert packed_loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_all_offered_language_models_can_be_packed(tmp_path: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {config["model_type"] for checkpoint in known_checkpoints() if (config := known_config(checkpoint))}
    known -= set(FAMILIES)  # pretrained VLMs, some of which count as causal language models, too
    assert (
        known & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(PACKABLE) == {kind.partition("-")[0] for kind in OPTIONS}
    )


def test_models_that_mix_clips_are_refused(
    qwen_folders: dict[str, Path], llava_folder: Path, llm_folder: Path, moe_folder: Path, tmp_path: Path
) -> None:
    from transformers import Mamba2Config

    for folder in (llava_folder, llm_folder, moe_folder):
        check_packing(folder, "llm=native", is_vlm=False)
    Mamba2Config().save_pretrained(tmp_path)
    # Positions in three axes are packed by the captioner of the pretrained VLM alone; other VLMs have a language model
    # that is packed.
    mrope = [folder for kind, folder in qwen_folders.items() if FAMILIES[kind].kind in ("mrope", "timed_mrope")]
    assert mrope
    for folder in (*mrope, tmp_path):
        with pytest.raises(
            UserError, match=r"which llm=native \(.*\) is not known to keep apart; set data\.batching=by_length"
        ):
            check_packing(folder, "llm=native", is_vlm=False)
