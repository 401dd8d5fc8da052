"""The native engine matches transformers' generate id by id in float32, and refuses unsupported models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmcap.config import EvaluationConfig, LoraConfig
from vlmcap.models.decoding.engine import greedy_ids, native_engine_obstacle
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.attention import FLASH, REPEATED, register_repeated_keys

VOCABULARY, WIDTH, NEW = 60, 64, 20
LENGTHS = (9, 4, 13, 7, 13, 5, 10, 6, 11)  # of the prompts; more of them than rows
STOPS = (1, 2, 3)
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
)
SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make_model(kind: str, **changes: Any) -> nn.Module:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # so that captions depend on what comes before them
    }
    by_class: dict[str, dict[str, Any]] = {
        "Llama": {},
        "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},
        "Qwen3Moe": {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    }
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**common | by_class[kind] | changes)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Qwen3Moe", "adapted"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param != "adapted":
        return make_model(request.param)
    adapted = add_lora(make_model("Qwen3"), LoraConfig(rank=4, alpha=8, dropout=0.5))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


@torch.no_grad()
def expected(model: nn.Module, prompts: list[Tensor], settings: GenerationSettings) -> list[list[int]]:
    """Generates with transformers in one left-padded batch, and truncates after the end token."""
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    embeddings = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones(len(one)).long() for one in prompts], batch_first=True, padding_side="left"
    )
    penalty = settings.rules.repetition_penalty
    ids = model.generate(  # type: ignore[operator]
        inputs_embeds=embeddings,
        attention_mask=mask,
        **settings.as_arguments(),
        repetition_penalty=1.0,
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else []),
        eos_token_id=list(STOPS),
        pad_token_id=0,
    ).tolist()
    ends = [next((index + 1 for index, token in enumerate(row) if token in STOPS), len(row)) for row in ids]
    return [row[:end] for row, end in zip(ids, ends, strict=True)]


class Calls:
    """Records the shapes of each call: slots and tokens of the model, and slots and tokens of the head."""

    def __init__(self, model: nn.Module) -> None:
        inner: Any = base_model(model)
        self.steps: list[tuple[int, int]] = []
        self.prompts: list[tuple[int, int]] = []
        self.head: list[tuple[int, ...]] = []
        self.hooks = [
            inner.register_forward_pre_hook(self._note, with_kwargs=True),
            inner.lm_head.register_forward_hook(lambda _, inputs, output: self.head.append(tuple(output.shape[:2]))),
        ]

    def _note(self, _: Any, __: Any, arguments: dict[str, Any]) -> None:
        if "input_ids" in arguments:
            self.steps.append(tuple(arguments["input_ids"].shape))
        else:
            self.prompts.append(tuple(arguments["inputs_embeds"].shape[:2]))

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("num_slots", [3, 9])
@pytest.mark.parametrize("rules", RULES)
def test_captions_are_those_of_transformers(model: nn.Module, rules: dict[str, Any], num_slots: int) -> None:
    settings = GenerationSettings(NEW, EvaluationConfig(**rules))
    theirs = expected(model, prompts(), settings)
    assert greedy_ids(model, prompts(), settings, STOPS, num_slots) == theirs
    assert len({len(row) for row in theirs}) > 3, "rows must stop at different times"


@pytest.mark.parametrize("lookup", [1, 2])
@pytest.mark.parametrize("rules", RULES)
def test_guessing_changes_no_caption(model: nn.Module, rules: dict[str, Any], lookup: int) -> None:
    plain = GenerationSettings(NEW, EvaluationConfig(**rules))
    guessing = GenerationSettings(NEW, EvaluationConfig(speculate_ngram=lookup, **rules))
    assert greedy_ids(model, prompts(), guessing, STOPS, 4) == expected(model, prompts(), plain)


@pytest.mark.parametrize("seed", range(2))
def test_guesses_save_steps_where_text_goes_in_circles(seed: int) -> None:
    model = make_model("Llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name:
                parameter.zero_()  # a token then depends on the one before it alone, so every text ends in a circle
    counts = {}
    for lookup in (0, 2):
        with Calls(model) as calls:
            ids = greedy_ids(
                model,
                prompts((9, 4, 13), seed),
                GenerationSettings(100, EvaluationConfig(speculate_ngram=lookup)),
                (),
                3,
            )
        counts[lookup] = (len(calls.steps), ids)
    assert counts[0][1] == counts[2][1]
    assert counts[2][0] < counts[0][0] / 2


def test_eager_attention_writes_the_same() -> None:
    model = make_model("Qwen3")
    settings = GenerationSettings(NEW)
    fused = greedy_ids(model, prompts(), settings, STOPS, 3)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    assert not native_engine_obstacle(model)
    assert greedy_ids(model, prompts(), settings, STOPS, 3) == fused


@pytest.mark.parametrize("attention", [REPEATED, *FLASH])
def test_attention_of_other_gpus_writes_the_same(attention: str) -> None:
    """A T4's attention implementation is supported unchanged.

    Where flash-attn is installed, PyTorch's decodes in its place, which needs no such package.
    """
    register_repeated_keys()
    model: Any = make_model("Qwen3")
    settings = GenerationSettings(NEW, EvaluationConfig(speculate_ngram=2))
    expected_ids = greedy_ids(model, prompts(), settings, STOPS, 3)
    seen: set[str] = set()
    model.lm_head.register_forward_hook(lambda *_: seen.add(model.config._attn_implementation))
    model.config._attn_implementation = attention
    assert not native_engine_obstacle(model)
    assert greedy_ids(model, prompts(), settings, STOPS, 3) == expected_ids
    assert seen == {attention if attention == REPEATED else "sdpa"}
    assert model.config._attn_implementation == attention, "training goes on with its own"


def test_ended_rows_leave_and_waiting_clips_take_their_places(model: nn.Module) -> None:
    settings = GenerationSettings(NEW)
    lengths = [len(row) for row in expected(model, prompts(), settings)]
    with Calls(model) as calls:
        greedy_ids(model, prompts(), settings, STOPS, 3)
    assert sum(rows for rows, _ in calls.prompts) == len(LENGTHS)
    # A caption's first token comes with its prompt, and nobody is stepped for longer than that.
    assert sum(rows for rows, _ in calls.steps) == sum(lengths) - len(lengths)
    assert max(rows for rows, _ in calls.steps) == 3
    batches = sum(max(lengths[start : start + 3]) for start in range(0, len(lengths), 3))
    assert len(calls.steps) < batches - 3


def test_the_head_runs_on_last_tokens_only(model: nn.Module) -> None:
    with Calls(model) as calls:
        greedy_ids(model, prompts(), GenerationSettings(NEW), STOPS, 4)
    assert {tokens for _, tokens in calls.head} == {1}
    assert calls.prompts[0][1] > 1


def test_prompts_are_drawn_as_rows_get_free() -> None:
    model = make_model("Qwen3")
    drawn = 0

    def lazily() -> Iterator[Tensor]:
        nonlocal drawn
        for prompt in prompts():
            drawn += 1
            yield prompt

    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append((drawn, 0)))
    greedy_ids(model, lazily(), GenerationSettings(NEW), STOPS, 2)
    hook.remove()
    assert seen[0] == (2, 0)
    assert seen[-1] == (len(LENGTHS), 0)


@pytest.mark.parametrize("most", [1, 2])
def test_short_limits(most: int) -> None:
    model = make_model("Llama")
    settings = GenerationSettings(most, EvaluationConfig(speculate_ngram=1))
    assert greedy_ids(model, prompts(), settings, STOPS, 2) == expected(model, prompts(), settings)
    assert greedy_ids(model, [], settings, STOPS, 2) == []


def meta_encoder(kind: str, **changes: Any) -> Any:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SMALL | changes))


def test_full_attention_is_taken_with_and_without_adapters() -> None:
    for kind in ("Llama", "Qwen2", "Qwen3", "Qwen3Moe"):
        assert not native_engine_obstacle(meta_encoder(kind)), kind
    assert not native_engine_obstacle(add_lora(meta_encoder("Qwen3"), LoraConfig(rank=2, alpha=2)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            "Qwen3",
            {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 8},
        ),
        ("Gemma2", {}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_windows_other_classes_and_moving_angles_are_not(kind: str, changes: dict[str, Any]) -> None:
    assert native_engine_obstacle(meta_encoder(kind, **changes))


def test_what_only_transformers_does_is_left_to_it() -> None:
    model = meta_encoder("Llama")
    model.generation_config.suppress_tokens = [3]
    assert native_engine_obstacle(model)
    model = meta_encoder("Llama")
    model.config._attn_implementation = "flex_attention"
    assert native_engine_obstacle(model)
    assert native_engine_obstacle(nn.Linear(2, 2))
