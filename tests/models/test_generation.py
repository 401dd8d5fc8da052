"""Decoding through the captioner: cache, padding, beams and sampling have their intended effects only."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmcap.config import Engine, EvaluationConfig, LlmConfig, LoraConfig, MlpConfig, Temporal
from vlmcap.data.loading.collate import Collator
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.encoders import EncoderOptions, load_encoder
from vlmcap.models.llm.adapt import add_lora, base_model
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.projectors import ProjectorSizes, build_projector
from vlmcap.types import Batch, Clip, GridTHW, Sample

NEW = 10  # tokens
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.5},
)


@pytest.fixture(scope="session")
def llama_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with random weights and keys and values per head, as in Vicuna."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def captioner(
    request: pytest.FixtureRequest, llm_folder: Path, llama_folder: Path, siglip_folder: Path
) -> VideoCaptioner:
    return build(llm_folder if request.param == "qwen3" else llama_folder, siglip_folder)


def build(folder: Path, encoder_folder: Path) -> VideoCaptioner:
    torch.manual_seed(0)
    llm = load_language_model(folder, dtype=torch.float32, quantization="none", attention="sdpa", device="cpu")
    adapted = add_lora(llm, LoraConfig(rank=4, alpha=8, dropout=0.5, target_modules="q_proj,v_proj"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    encoder = load_encoder(encoder_folder, EncoderOptions(-1, torch.float32)).requires_grad_(False)
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."))
    projector = build_projector(
        MlpConfig(temporal=Temporal.none), ProjectorSizes(in_dim=32, out_dim=64, grid=(2, 2), num_frames=3)
    )
    with torch.no_grad():
        [module for module in projector.modules() if isinstance(module, nn.Linear)][-1].weight.mul_(
            10
        )  # captions then depend on the video
    return VideoCaptioner(encoder, projector, adapted, prompt, GenerationSettings(NEW)).eval()


def with_settings(
    captioner: VideoCaptioner, *, num_slots: int | None = None, use_cache: bool = True, **rules: Any
) -> VideoCaptioner:
    captioner.generation = GenerationSettings(NEW, EvaluationConfig(**rules), num_slots, use_cache)
    return captioner


def samples(*frames: int) -> list[Sample]:
    """Returns features of clips with these numbers of frames, so that prompts differ in length."""
    generator = torch.Generator().manual_seed(3)
    clips = [Clip(str(i), Path(f"{i}.mp4"), ()) for i in range(len(frames))]
    features = [torch.randn(count, 4, 32, generator=generator) for count in frames]
    return [Sample(c, features=f, grid_thw=(len(f), 2, 2)) for c, f in zip(clips, features, strict=True)]


def count(grid_thw: GridTHW | None, _times: object) -> tuple[int]:
    assert grid_thw is not None
    return (grid_thw[0] * grid_thw[1] * grid_thw[2],)


def collate(captioner: VideoCaptioner, items: list[Sample]) -> Batch:
    return Collator(captioner.prompt, count, 200, mode="generate")(items)


def ids_of(captioner: VideoCaptioner, batch: Batch) -> list[list[int]]:
    """Returns the generated ids, up to and including the first end token."""
    kept: list[Any] = []
    decode = captioner.prompt.tokenizer.batch_decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            captioner.prompt.tokenizer,
            "batch_decode",
            lambda ids, **options: kept.extend(ids) or decode(ids, **options),
        )
        captioner.generate(batch)
    return [cut(row, captioner.prompt.stop_ids) for row in kept]


def cut(row: list[int], stops: list[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


@pytest.mark.parametrize("settings", SETTINGS)
def test_with_cache_is_without_cache(captioner: VideoCaptioner, settings: dict[str, Any]) -> None:
    batch = collate(captioner, samples(2, 3))
    cached = ids_of(with_settings(captioner, **settings), batch)
    assert cached == ids_of(with_settings(captioner, use_cache=False, **settings), batch)
    assert cached[0] != cached[1]
    assert max(map(len, cached)) > 4  # or hardly anything would be cached


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_is_its_clips_one_by_one(captioner: VideoCaptioner, settings: dict[str, Any]) -> None:
    """Left padding is masked, and positions do not count it."""
    items = samples(1, 3, 2)
    batch = collate(captioner, items)
    assert batch.attention_mask.sum(1).tolist() == [
        len(row) - 4 * short for row, short in zip(batch.input_ids, (2, 0, 1), strict=True)
    ]
    assert batch.attention_mask[:, -1].all()
    with_settings(captioner, **settings)
    together = ids_of(captioner, batch)
    assert together == [ids_of(captioner, collate(captioner, [item]))[0] for item in items]
    assert len({tuple(row) for row in together}) == 3


@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"speculate_ngram": 1}, {"num_beams": 2}]
)
def test_few_rows_and_either_engine_write_the_same(captioner: VideoCaptioner, settings: dict[str, Any]) -> None:
    batch = collate(captioner, samples(1, 3, 2, 3, 1))
    expected = ids_of(with_settings(captioner, engine=Engine.hf, **settings), batch)
    assert len({tuple(row) for row in expected}) == 5
    for engine in (Engine.native, Engine.hf):
        assert ids_of(with_settings(captioner, engine=engine, num_slots=2, **settings), batch) == expected


@pytest.mark.parametrize(
    ("settings", "is_own"),
    [
        ({}, True),
        ({"engine": Engine.hf}, False),
        ({"num_beams": 2}, False),
        ({"do_sample": True}, False),
        ({"use_cache": False}, False),
    ],
)
def test_who_writes(
    captioner: VideoCaptioner, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], is_own: bool
) -> None:
    calls: list[str] = []
    generate = captioner.llm.generate
    monkeypatch.setattr(captioner.llm, "generate", lambda **named: calls.append("hf") or generate(**named))  # type: ignore[operator]
    with_settings(captioner, **settings).generate(collate(captioner, samples(1, 2)))
    assert with_settings(captioner, **settings).use_continuous_batching == is_own
    assert calls == ([] if is_own else ["hf"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "as the native engine supports greedy search only.\n"),
        (
            {"num_beams": 2, "speculate_ngram": 2},
            "as the native engine supports greedy search only; evaluation.speculate_ngram is ignored.\n",
        ),
        ({}, ""),
        ({"engine": Engine.hf}, ""),
    ],
)
def test_why_the_native_engine_cannot_run_is_printed_once(
    captioner: VideoCaptioner,
    settings: dict[str, Any],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(captioner, "_has_explained", False)  # other tests share the captioner
    for _ in range(2):
        with_settings(captioner, **settings).generate(collate(captioner, samples(1, 2)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "evaluation.engine=native" in line]
    assert [line.partition("native, ")[2] for line in lines] == reason.splitlines()


def test_after_running_out_of_memory_fewer_slots_decode_the_same(
    captioner: VideoCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = collate(captioner, samples(1, 3, 2, 3, 1))
    expected = ids_of(with_settings(captioner), batch)

    def run_out(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        if "input_ids" in arguments and len(arguments["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model: Any = base_model(captioner.llm)
    hook = model.register_forward_pre_hook(run_out, with_kwargs=True)
    try:
        most = 1
        assert ids_of(with_settings(captioner, num_slots=4), batch) == expected
        assert captioner.generation.num_slots == 1
        assert capsys.readouterr().err == "".join(
            f"Memory ran out: from now on, at most {slots} captions are decoded at a time.\n" for slots in (2, 1)
        )
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            captioner.generate(batch)
    finally:
        hook.remove()


@pytest.mark.parametrize("engine", [Engine.native, Engine.hf])
def test_merged_adapters_write_the_same(captioner: VideoCaptioner, engine: Engine) -> None:
    batch = collate(captioner, samples(1, 3, 2, 3, 1))
    expected = ids_of(with_settings(captioner, engine=engine), batch)
    captioner.generation = dataclasses.replace(captioner.generation, is_merged=True)
    seen: set[bool] = set()
    layer: Any = next(module for module in captioner.llm.modules() if hasattr(module, "merged_adapters"))
    hook = layer.register_forward_hook(lambda lora, *_: seen.add(lora.merged))
    assert ids_of(captioner, batch) == expected
    hook.remove()
    assert seen == {True}
    assert not layer.merged


def test_waiting_clips_are_encoded_when_a_slot_is_free(captioner: VideoCaptioner) -> None:
    rows: list[int] = []
    hook = captioner.projector.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    with_settings(captioner, num_slots=2).generate(collate(captioner, samples(2, 2, 2, 2, 2)))
    hook.remove()
    assert rows == [2, 2, 1]


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_greedy_is_the_best_next_token_each_time(captioner: VideoCaptioner, use_cache: bool) -> None:
    """Compares with a plain loop without padding and cache."""
    (item,) = samples(2)
    batch = collate(captioner, [item])
    model: Any = captioner.llm
    embeddings, expected = captioner.embed(batch), []
    for _ in range(NEW):
        token = int(model(inputs_embeds=embeddings).logits[0, -1].argmax())
        expected.append(token)
        if token in captioner.prompt.stop_ids:
            break
        embeddings = torch.cat([embeddings, model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    assert ids_of(with_settings(captioner, use_cache=use_cache), batch) == [expected]


@torch.no_grad()
def sequence_score(captioner: VideoCaptioner, batch: Batch, row: list[int]) -> float:
    """Returns the mean log-probability of the generated tokens, by which beams are ranked."""
    model: Any = captioner.llm
    prompt = captioner.embed(batch)
    words = model.get_input_embeddings()(torch.tensor([row]))
    logits: Tensor = model(inputs_embeds=torch.cat([prompt, words], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None]).mean())


def test_beams_find_no_less_likely_captions(captioner: VideoCaptioner) -> None:
    gains = []
    for item in samples(2, 3):
        batch = collate(captioner, [item])
        greedy = ids_of(with_settings(captioner), batch)[0]
        beam = ids_of(with_settings(captioner, num_beams=4), batch)[0]
        gains.append(sequence_score(captioner, batch, beam) - sequence_score(captioner, batch, greedy))
    assert min(gains) > -1e-5
    assert max(gains) > 0.01


@pytest.mark.parametrize("num_beams", [1, 2])
def test_it_stops_at_every_end_token(captioner: VideoCaptioner, num_beams: int) -> None:
    (item,) = samples(2)
    batch = collate(captioner, [item])
    with_settings(captioner, num_beams=num_beams)
    prompt = captioner.prompt
    free = ids_of(captioner, batch)[0]
    ended = 0
    try:
        for stops in ([free[1]], [prompt.end_id, free[1]], [free[4], prompt.end_id]):
            captioner.prompt = dataclasses.replace(prompt, stop_ids=stops)
            row = ids_of(captioner, batch)[0]
            assert not set(row[:-1]) & set(stops)
            ended += row[-1] in stops
            assert row[-1] in stops or (num_beams > 1 and len(row) == NEW)  # a beam may get by
    finally:
        captioner.prompt = prompt
    assert ended


def test_rows_that_have_ended_wait_for_the_others(captioner: VideoCaptioner) -> None:
    items = samples(2, 3)
    with_settings(captioner)
    prompt = captioner.prompt
    first, second = ids_of(captioner, collate(captioner, items))
    stop = next(token for token in first[1:6] if token not in second)
    try:
        captioner.prompt = dataclasses.replace(prompt, stop_ids=[stop])
        short, long = ids_of(captioner, collate(captioner, items))
        assert short == cut(first, [stop])
        assert long == second
        texts = captioner.generate(collate(captioner, items))
        assert texts == captioner.prompt.decode([short, long])
    finally:
        captioner.prompt = prompt


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4}, {"do_sample": True}])
def test_the_encoder_runs_once(captioner: VideoCaptioner, settings: dict[str, Any]) -> None:
    """Beams share the visual tokens, and no decoding step computes them again."""
    frames = torch.randint(0, 256, (2, 3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    clips = [Clip(str(i), Path(f"{i}.mp4"), ()) for i in range(2)]
    items = [Sample(clip, frames=row, grid_thw=(3, 2, 2)) for clip, row in zip(clips, frames, strict=True)]
    calls: list[str] = []
    assert captioner.encoder is not None
    hooks = [
        captioner.encoder.register_forward_hook(lambda *_: calls.append("encoder")),
        captioner.projector.register_forward_hook(lambda *_: calls.append("projector")),
    ]
    with_settings(captioner, **settings).generate(collate(captioner, items))
    for hook in hooks:
        hook.remove()
    assert calls == ["encoder", "projector"]


def test_repetition_controls_work(captioner: VideoCaptioner) -> None:
    """The padding before a clip, of any length, is not part of the generated text."""
    batch = collate(captioner, samples(1, 3))
    captioner.generation = GenerationSettings(24, EvaluationConfig(no_repeat_ngram_size=2))
    assert not any(has_repeated_pair(row) for row in ids_of(captioner, batch))
    captioner.generation = GenerationSettings(24)
    assert any(len(set(row)) < len(row) for row in ids_of(captioner, batch))
    captioner.generation = GenerationSettings(24, EvaluationConfig(repetition_penalty=1e4))
    assert all(len(set(row)) == len(row) for row in ids_of(captioner, batch))


def has_repeated_pair(row: list[int]) -> bool:
    pairs = list(itertools.pairwise(row))
    return len(set(pairs)) < len(pairs)


def test_sampling_follows_the_seed_and_its_settings(captioner: VideoCaptioner) -> None:
    batch = collate(captioner, samples(2, 3))

    def sample(seed: int, **settings: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        return ids_of(with_settings(captioner, do_sample=True, **settings), batch)

    greedy = ids_of(with_settings(captioner), batch)
    assert sample(1, temperature=3.0) == sample(1, temperature=3.0)
    assert sample(1, temperature=3.0) != sample(2, temperature=3.0)
    assert sample(1, temperature=1e-4) == greedy
    assert sample(1, temperature=3.0, top_p=1e-6) == greedy
    assert sample(1, temperature=3.0, top_k=1) == greedy


def test_the_checkpoints_own_settings_do_not_sample(llm_folder: Path, siglip_folder: Path, tmp_path: Path) -> None:
    """Qwen3's file enables sampling, Vicuna's sets a temperature without sampling and a maximum length."""
    reference = build(llm_folder, siglip_folder)
    batch = collate(reference, samples(2, 3))
    expected = ids_of(reference, batch)
    folder = shutil.copytree(llm_folder, tmp_path / "copy")
    for settings in (
        '{"temperature": 0.9, "top_p": 0.6, "max_length": 4}',
        '{"do_sample": true, "temperature": 9.0, "num_beams": 2}',
    ):
        (folder / "generation_config.json").write_text(settings)
        captioner = build(folder, siglip_folder)
        captioner.prompt = reference.prompt
        assert ids_of(captioner, batch) == expected


def test_a_batch_of_prompts_has_some_clips_per_slot_and_not_too_many(captioner: VideoCaptioner) -> None:
    sizes = {slots: with_settings(captioner, num_slots=slots).prompt_batch_size for slots in (1, 10, 64, 200)}
    assert sizes == {1: 4, 10: 40, 64: 128, 200: 200}
    assert with_settings(captioner, num_slots=10, engine=Engine.hf).prompt_batch_size == 10
