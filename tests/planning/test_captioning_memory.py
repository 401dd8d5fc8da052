"""What evaluation takes beside weights.

Copies of keys and values for a token, the loss of validation, models of scores.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.compose import compose
from vlmcap.config import EvaluationConfig
from vlmcap.models.decoding.engine import greedy_ids
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.planning.caption_lengths import CaptionLengths
from vlmcap.planning.estimate.live_bytes import LiveBytes
from vlmcap.planning.estimate.memory_profiler import MemoryProfiler
from vlmcap.planning.estimate.sizes import uses_native_decoding
from vlmcap.planning.hardware import GIB, planned_device
from vlmcap.planning.make_plan import fullest_batch, make_plan
from vlmcap.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("store")

ROWS, PROMPT, NEW = 4, 2040, 16
LAYERS, HEADS, KV_HEADS, DIM = 4, 8, 2, 64
CACHE = 2 * LAYERS * KV_HEADS * DIM * 4 * ROWS * (PROMPT + NEW)


def planned(*overrides: str, captions: CaptionLengths | None = None) -> Plan:
    return make_plan(compose(["data.root=unset", *overrides]), captions=captions)


@pytest.mark.slow
def test_the_library_copies_a_block_of_the_cache_for_each_token_and_ours_none_as_planned() -> None:
    """Counted on running models: what is alive in the last steps, over what the plan has for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "head_dim": DIM, "vocab_size": 50}
    config = AutoConfig.for_model("qwen3", num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **sizes)
    llm: Any = AutoModelForCausalLM.from_config(config).eval()
    prompts = torch.randn(ROWS, PROMPT, 64)
    settings = GenerationSettings(NEW, EvaluationConfig())
    mask = torch.ones(ROWS, PROMPT, dtype=torch.int64)
    mask[1:, 0] = 0  # padded, as prompts of clips of different sizes are

    def peak_of_steps(engine: str) -> float:
        live, calls = LiveBytes(), list[int]()

        def enter(*_: Any) -> None:
            calls.append(1)
            live.enter("prompt" if len(calls) == 1 else "step")

        handle = llm.register_forward_pre_hook(enter)
        with live, torch.no_grad():
            if engine == "native":
                greedy_ids(llm, iter(prompts), settings, [50], ROWS)
            else:
                llm.generate(
                    inputs_embeds=prompts,
                    attention_mask=mask,
                    **settings.as_arguments(),
                    eos_token_id=50,
                    pad_token_id=0,
                )
        handle.remove()
        return float(live.peaks["step"].total())

    assert peak_of_steps("hf") == pytest.approx(CACHE * (1 + 1 / LAYERS), rel=0.05)
    assert CACHE <= peak_of_steps("native") < CACHE * (1 + 0.5 / LAYERS)


@pytest.mark.slow
def test_the_plan_counts_those_copies_and_beams() -> None:
    base = [
        "encoder=clip",
        "projector.reducer=pool",
        "llm=qwen3_4b",
        "hardware=l4",
        "data.eval_batch_size=8",
        "llm.max_new_tokens=4000",
    ]
    native, beams = planned(*base), planned(*base, "evaluation.num_beams=4", "data.eval_batch_size=2")
    assert uses_native_decoding(compose(["data.root=unset", *base]))
    assert not uses_native_decoding(compose(["data.root=unset", *base, "evaluation.engine=hf"]))
    assert not uses_native_decoding(compose(["data.root=unset", "model=qwen3_vl_8b", "hardware=l4"]))
    cache = 2 * 36 * 8 * 128 * 2 * 8 * (native.num_visual + 32 + 4000)
    for plan in (native, beams):  # eight rows each
        assert plan.generation.sizes["keys and values"] == cache
    assert beams.generation.sizes["one block's copy of them"] == pytest.approx(cache / 36)
    assert "one block's copy of them" not in native.generation.sizes, "it is there from the first prompt on"
    old = planned(*base, "hardware=t4", "data.eval_batch_size=8")
    assert old.generation.sizes["one block's copy of them"] == pytest.approx(
        old.generation.sizes["keys and values"] * 4 / 36
    )


@pytest.mark.slow
def test_the_loss_of_validation_is_planned_where_logits_are_all_made_at_once() -> None:
    base = [
        "encoder=clip",
        "projector.reducer=pool",
        "llm=qwen3_4b",
        "hardware=h100",
        "data.batch_size=16",
        "data.eval_batch_size=16",
    ]
    few, all_at_once = planned(*base), planned(*base, "hardware.loss_chunk_mib=null")
    assert all_at_once.generation.name.startswith("validation loss")
    logits = 16 * 768 * 151936 * (2 + 4)  # the head's, and those in float32
    assert all_at_once.generation.allocated - few.generation.allocated > 0.5 * logits
    assert "language model: head and loss" in all_at_once.generation.sizes


@pytest.mark.slow
def test_a_batch_of_tokens_holds_as_many_short_clips_as_there_may_be() -> None:
    config = compose(
        [
            "data.root=unset",
            "encoder=clip",
            "llm=qwen3_4b",
            "hardware=l4",
            "data.batching=by_length",
            "data.max_tokens_per_batch=16000",
        ]
    )
    memory_profiler, lengths = MemoryProfiler(config, True), CaptionLengths.of([100, 300, 768], 768)
    prompt = memory_profiler.sizes.num_visual + memory_profiler.sizes.num_prompt
    assert fullest_batch(config, memory_profiler, lengths) == (3, 16000 // 3 - prompt)
    assert 3 * (prompt + 16000 // 3 - prompt) <= 16000 < 4 * (prompt + 100)
    one = planned("encoder=clip", "llm=qwen3_4b", "hardware=l4")
    three = make_plan(config, captions=lengths)
    assert three.batch_size == 3
    assert three.training_gib > one.training_gib + 2


@pytest.mark.slow
def test_seconds_go_by_padded_batches_and_memory_by_the_longest_caption() -> None:
    base = ["encoder=dinov3_l", "llm=qwen3_4b", "hardware=h100", "data.eval_batch_size=16"]
    short, equal = CaptionLengths.of([100, 120, 140, 768], 768), CaptionLengths.of([768], 768)
    some, all_long = planned(*base, captions=short), planned(*base, captions=equal)
    assert some.training == all_long.training
    assert some.token_s == all_long.token_s
    share = (some.num_visual + 32 + short.longest_of(4)) / (some.num_visual + 32 + 768)
    assert share < some.clip_s / all_long.clip_s < 1, "the encoder's part is the same"
    by_length = planned(*base, "data.batching=by_length", captions=short)
    assert by_length.clip_s < some.clip_s, "clips of like length pad less"
    steps = (3 * short.mean + short.longest_of(16), 3 * equal.mean + equal.longest_of(16))
    assert (some.caption_s - all_long.caption_s) == pytest.approx((steps[0] - steps[1]) * some.token_s / 64)


def test_assumed_captions_are_those_of_the_korean_data() -> None:
    lengths = CaptionLengths.assumed(708)
    assert lengths.longest == 708
    assert lengths.mean == pytest.approx(402, rel=0.04)
    assert lengths.tokens[0] == pytest.approx(311, rel=0.04)
    assert lengths.longest_of(1) == pytest.approx(lengths.mean)
    assert lengths.mean < lengths.longest_of(4) < lengths.longest_of(64) < 708
    assert len(CaptionLengths.of(range(1, 5000), 4000).tokens) <= 400
    assert CaptionLengths.of(range(1, 5000), 4000).longest == 4000


@pytest.mark.slow
def test_models_of_scores_are_traced_at_their_size(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    settings = BertConfig(
        hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=192, vocab_size=900
    )
    model = BertModel(settings).eval()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings.to_dict()), encoding="utf-8")
    base = ["data.root=unset", "llm=qwen3_4b", "encoder=clip", "hardware=l4"]
    config = compose(
        [*base, f"evaluation.bert_checkpoint={tmp_path / 'bert'}", "evaluation.siglip_checkpoint=someone/unknown"]
    )
    profiles = MemoryProfiler(config, True).scores()
    assert profiles["siglip_checkpoint"] is None
    assert make_plan(config).not_counted == ["evaluation.siglip_checkpoint"]
    profile = profiles["bert_checkpoint"]
    assert profile is not None
    assert sum(profile.weights.values()) == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )
    live, ids = LiveBytes(), torch.ones(16, 512, dtype=torch.int64)
    live.exclude([*model.parameters(), *model.buffers(), ids])
    with live, torch.inference_mode():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    assert len(output.hidden_states) == 7
    assert max(sum(peak.values()) for peak in profile.peaks.values()) == pytest.approx(
        live.peaks["start"].total(), rel=0.1
    )


@pytest.mark.slow
def test_a_large_model_of_a_score_is_the_fullest_moment() -> None:
    base = [
        "encoder=clip",
        "projector.reducer=pool",
        "llm=qwen3_4b",
        "hardware=t4",
        "data.eval_batch_size=1",
        "cache.enabled=true",
    ]
    plain, scored = planned(*base), planned(*base, "evaluation.siglip_checkpoint=google/siglip2-so400m-patch14-384")
    assert scored.generation.name.startswith("siglip")
    assert scored.generation.sizes["siglip: weights"] == pytest.approx(4 * 1.136e9, rel=0.02), "both towers, in float32"
    assert scored.training == plain.training
    assert scored.host.total >= plain.host.total


def test_reserved_stands_beside_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    overrides = ["encoder=clip", "llm=qwen3_4b", "hardware=l4"]
    growing = planned(*overrides)
    plain = growing.plain()["training"]
    assert plain["allocated_gib"] < plain["reserved_gib"]
    assert plain["reserved_gib"] == pytest.approx(growing.training_gib - growing.device.context_gib, abs=1e-3)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    fixed = planned(*overrides)
    assert fixed.training.allocated == growing.training.allocated
    assert fixed.training.total > growing.training.total
    assert planned("hardware=cpu").training.allocated == planned("hardware=cpu").training.total
    assert planned_device(compose(["hardware=cpu"])).context_gib == 0
    assert GIB and dataclasses.is_dataclass(growing)
