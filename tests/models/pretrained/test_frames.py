"""Pretrained VLMs with frames of one size, as components, match the classes of transformers."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints.pretrained import CASES, MEAN, SIDE, STD
from vlmcap.compose import compose
from vlmcap.config import EvaluationConfig, LlmConfig, LoraConfig
from vlmcap.data.loading.collate import Collator
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.adapt import add_lora
from vlmcap.models.llm.attention import PACKABLE
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.pretrained import VlmComponents, load_pretrained
from vlmcap.models.pretrained.components import number_words
from vlmcap.models.pretrained.families import FAMILIES, model_class
from vlmcap.models.pretrained.merged import merged_pretrained
from vlmcap.planning.estimate.sizes import clip_sizes
from vlmcap.types import Batch, Clip, Sample

FRAMES = 3
PROJECTORS = ("multi_modal_projector", "connector", ".aligner")
TIMES_S = (0, 59, 3661)
CAPTIONS = ("푸른 바다 위로 아침 해가 천천히 떠오른다.", "산이다.")


@dataclass(frozen=True)
class Setup:
    """Components of a model, the captioner that they make, and the class of transformers as its reference."""

    folder: Path
    parts: VlmComponents
    captioner: VideoCaptioner
    reference: Any
    num_tokens: int

    def batch(self, mode: str = "train") -> Batch:
        samples = [
            Sample(Clip(str(row), f"{row}.mp4", (text,)), frames=self.parts.encoder.transform(clip(row)))
            for row, text in enumerate(CAPTIONS)
        ]
        layout = pickle.loads(pickle.dumps(self.parts.layout((FRAMES, *self.parts.encoder.grid))))
        return Collator(self.captioner.prompt, layout, 200, mode=mode)(samples)  # type: ignore[arg-type]

    def reference_inputs(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.frames is not None
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
        pixels = (batch.frames.float() - mean) / std  # (B, F, 3, S, S)
        config, is_video = self.reference.config, hasattr(self.reference.model, "get_video_features")
        token = config.video_token_id if is_video else config.image_token_id
        frames = {"pixel_values_videos": pixels} if is_video else {"pixel_values": pixels.flatten(0, 1)}
        if hasattr(self.reference.model, "connector"):  # takes the frames of each clip
            frames = {"pixel_values": pixels}
        ids = batch.input_ids.masked_fill(batch.visual_mask, token)
        if FAMILIES[config.model_type].is_bidirectional:
            frames |= {"token_type_ids": batch.visual_mask.long()}
        return {"input_ids": ids, "attention_mask": batch.attention_mask, **frames}

    def reference_logits(self, batch: Batch, reference: Any = None) -> Tensor:
        """Logits of the class, scaled: Cohere's classes with vision leave out the scale of their language model."""
        scale = getattr(self.reference.config.get_text_config(), "logit_scale", 1.0)
        logits: Tensor = scale * (reference or self.reference)(**self.reference_inputs(batch)).logits
        return logits


def clip(row: int) -> Tensor:
    generator = torch.Generator().manual_seed(row)
    return torch.randint(0, 256, (FRAMES, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def load(folder: Path, **changes: Any) -> VlmComponents:
    options: dict[str, Any] = {"dtype": torch.float32, "quantization": "none", "attention": "sdpa", "device": "cpu"}
    return load_pretrained(folder, max_patches=1, **options | changes)


def join(parts: VlmComponents, folder: Path) -> VideoCaptioner:
    around = {"visual_prefix": parts.visual_prefix, "visual_suffix": parts.visual_suffix}
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."), **around)
    return parts.captioner_class(
        parts.encoder, parts.projector, parts.llm, prompt, GenerationSettings(max_new_tokens=8)
    ).eval()


def prepared(name: str, folder: Path) -> Setup:
    kind, _, per_frame, per_clip = CASES[name]
    parts, reference = load(folder), model_class(kind).from_pretrained(folder).eval()
    return Setup(folder, parts, join(parts, folder), reference, FRAMES * per_frame + per_clip)


@pytest.fixture(scope="module", params=CASES)
def setup(request: pytest.FixtureRequest, frames_folder: Callable[[str], Path]) -> Setup:
    return prepared(request.param, frames_folder(request.param))


@torch.no_grad()
def logits(captioner: VideoCaptioner, batch: Batch) -> Tensor:
    llm: Any = captioner.llm
    return llm(**captioner.language_inputs(batch, captioner.visual_tokens(batch)), use_cache=False).logits  # type: ignore[no-any-return]


def test_every_family_of_this_kind_is_tried() -> None:
    tried = {case[0] for case in CASES.values()} | {"llava_next_video"}  # in test_llava_bridge.py
    assert tried == {name for name, family in FAMILIES.items() if family.kind == "frames"}


@torch.no_grad()
def test_logits_are_the_references(setup: Setup, record_property: Callable[[str, object], None]) -> None:
    batch = setup.batch()
    real = batch.attention_mask.bool()
    ours, expected = logits(setup.captioner, batch), setup.reference_logits(batch)
    record_property(f"parity:model:{setup.reference.config.model_type}", (ours - expected)[real].abs().max().item())
    torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-5)
    assert batch.frames is not None
    other = logits(setup.captioner, replace(batch, frames=255 - batch.frames))
    assert (other - expected)[real].abs().max() > 0.1  # or parity would say nothing


def written(kind: str, processor: Any, num_tokens: int) -> str:
    """What transformers' processor writes for the frames of `TIMES_S`."""
    from transformers.video_utils import VideoMetadata

    image = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "image_seq_len": num_tokens}
    image |= {"global_image_token": "<global-img>", "global_image_tag": "<global-img>", "num_image_tokens": num_tokens}
    image |= {"img_size": math.isqrt(num_tokens), "patch_size": 1 if kind == "aya_vision" else math.isqrt(num_tokens)}
    image |= {"start_of_img_token": "<|START_OF_IMG|>", "tile_global_token": "TILE_GLOBAL"}
    image |= {"img_patch_token": "<image>", "end_of_img_token": "<|END_OF_IMG|>", "boi_token": "<|START_OF_IMG|>"}
    image |= {"eoi_token": "<|END_OF_IMG|>", "img_line_break_token": "<|IMG_LINE_BREAK|>"}
    image |= {"image_start_token": "<begin_of_image>", "image_end_token": "<end_of_image>"}
    image |= {"full_image_sequence": f"\n\n<start_of_image>{num_tokens * '<image>'}<end_of_image>\n\n"}
    state = SimpleNamespace(**image)
    metadata = VideoMetadata(total_num_frames=None, fps=1.0, frames_indices=TIMES_S)
    if kind == "smolvlm":
        video = {"pixel_values": torch.zeros(1, FRAMES), "video_metadata": [metadata]}
        return str(processor.replace_video_token(state, video, 0))
    inputs = {"num_crops": [0], "num_patches": [1], "rows": [[0]], "cols": [[0]]}
    return FRAMES * str(processor.replace_image_token(state, inputs, 0))


@pytest.mark.parametrize("kind", ["aya_vision", "cohere2_vision", "gemma3", "idefics3", "janus", "smolvlm"])
def test_prompts_are_the_processors(
    kind: str, frames_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", number_words)  # its package is not installed
    folder, processor = frames_folder(kind), model_class(kind).__name__.replace("ForConditionalGeneration", "Processor")
    parts = load(folder)
    captioner = join(parts, folder)
    sample = Sample(Clip("a", "a.mp4", ()), frames=parts.encoder.transform(clip(0)), times_s=tuple(map(float, TIMES_S)))
    batch = Collator(captioner.prompt, parts.layout((FRAMES, *parts.encoder.grid)), 8, "generate")([sample])
    tokenizer = captioner.prompt.tokenizer
    ours = batch.input_ids.masked_fill(batch.visual_mask, tokenizer.convert_tokens_to_ids("<image>"))
    text = written(kind, getattr(transformers, processor), CASES[kind][2])
    turns = [{"role": "user", "content": text + "설명해 주세요."}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert ours[0].tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_numbers_are_written_in_words() -> None:
    """As by num2words, which SmolVLM's processor uses."""
    words = {0: "zero", 8: "eight", 16: "sixteen", 20: "twenty", 32: "thirty-two", 64: "sixty-four"}
    words |= {100: "one hundred", 128: "one hundred and twenty-eight", 999: "nine hundred and ninety-nine"}
    assert {number: number_words(number) for number in words} == words


@torch.no_grad()
def test_loss_and_captions_are_the_references(setup: Setup) -> None:
    captioner, train, ask = setup.captioner, setup.batch(), setup.batch("generate")
    loss, count = captioner(train)
    vocabulary = {"vocab_size": setup.reference.config.get_text_config().vocab_size}
    expected = setup.reference.loss_function(setup.reference_logits(train), train.labels, **vocabulary)
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5)
    stop = {"eos_token_id": captioner.prompt.stop_ids, "pad_token_id": captioner.prompt.pad_id}
    arguments = captioner.generation.as_arguments() | stop
    ids = setup.reference.generate(**setup.reference_inputs(ask), **arguments)
    # By the native engine, but for the classes that it does not know.
    assert captioner.use_continuous_batching == (setup.reference.config.get_text_config().model_type in PACKABLE)
    texts = captioner.generate(ask)
    assert texts == captioner.prompt.decode(ids[:, ask.input_ids.shape[1] :].tolist())
    assert texts[0] != texts[1]


@torch.no_grad()
def test_the_tokens_of_a_frame_attend_in_both_directions(frames_folder: Callable[[str], Path]) -> None:
    gemma = prepared("gemma3", frames_folder("gemma3"))
    train, ask = gemma.batch(), gemma.batch("generate")
    causal = gemma.reference_inputs(train) | {"token_type_ids": torch.zeros_like(train.input_ids)}
    difference = logits(gemma.captioner, train) - gemma.reference(**causal).logits
    assert difference[train.attention_mask.bool()].abs().max() > 0.01
    gemma.captioner.generation = GenerationSettings(max_new_tokens=8, rules=EvaluationConfig(num_beams=2))
    stop = {"eos_token_id": gemma.captioner.prompt.stop_ids, "pad_token_id": gemma.captioner.prompt.pad_id}
    beams = gemma.reference.generate(**gemma.reference_inputs(ask), **gemma.captioner.generation.as_arguments(), **stop)
    expected = gemma.captioner.prompt.decode(beams[:, ask.input_ids.shape[1] :].tolist())
    assert gemma.captioner.generate(ask) == expected
    with pytest.raises(UserError, match=r"llm\.attention=flash_attention_2 takes no mask .* llm\.attention=sdpa"):
        load(gemma.folder, attention="flash_attention_2")


def test_the_stated_tokens_are_those_that_run(setup: Setup) -> None:
    runs = [run for run in setup.parts.layout((FRAMES, *setup.parts.encoder.grid))(None, None) if isinstance(run, int)]
    visual = setup.captioner.visual_tokens(setup.batch())
    assert sum(runs) == setup.parts.num_tokens(FRAMES, setup.parts.encoder.grid) == setup.num_tokens == len(visual) // 2


def test_the_planned_tokens_are_those_that_run(setup: Setup) -> None:
    """The settings of one file of this kind suit all checkpoints of this kind."""
    chosen = ["model=internvl3_1b", f"model.checkpoint={setup.folder}", f"data.num_frames={FRAMES}", "hardware=cpu"]
    sizes = clip_sizes(compose([*chosen, "llm.max_caption_tokens=64", "llm.max_new_tokens=64"]))
    assert sizes.num_visual == setup.num_tokens
    assert sum(sizes.runs) == setup.num_tokens
    assert len(sizes.runs) == (FRAMES if setup.parts.run_text else 1)


def test_features_of_the_cache_give_what_frames_give(setup: Setup) -> None:
    batch = setup.batch()
    cached = replace(batch, frames=None, features=setup.captioner.encode(batch))
    assert setup.captioner(cached)[0].item() == setup.captioner(batch)[0].item()


def test_projector_and_adapters_learn_and_nothing_else(setup: Setup) -> None:
    parts = load(setup.folder)
    captioner = join(replace(parts, llm=add_lora(parts.llm, LoraConfig(rank=4, alpha=8))), setup.folder)
    captioner.train()(setup.batch())[0].backward()
    learning = {name: parameter for name, parameter in captioner.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("projector.") or "lora_" in name for name in learning)
    assert [name for name, parameter in learning.items() if parameter.grad is None] == []
    assert list(captioner.projector.parameters())


def test_a_merged_model_is_the_references_with_the_trained_weights(setup: Setup, tmp_path: Path) -> None:
    parts = load(setup.folder)
    adapt: Callable[[Any], Any] = lambda model: add_lora(model, LoraConfig(rank=4, alpha=8))  # noqa: E731
    captioner = join(replace(parts, llm=adapt(parts.llm)), setup.folder)
    with torch.no_grad():
        for parameter in captioner.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    state = {f"captioner.{name}": tensor.clone() for name, tensor in captioner.state_dict().items()}
    whole, _ = merged_pretrained(setup.folder, state, adapt=adapt, dtype=torch.float32)
    whole.save_pretrained(tmp_path)  # type: ignore[operator]
    stock = type(setup.reference).from_pretrained(tmp_path).eval()
    batch = setup.batch()
    real = batch.attention_mask.bool()
    with torch.no_grad():
        expected = setup.reference_logits(batch, stock)
    torch.testing.assert_close(logits(captioner, batch)[real], expected[real], atol=1e-4, rtol=1e-4)


def test_a_tower_with_the_type_of_the_whole_model_is_read(frames_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As in the published files of Idefics3."""
    folder = shutil.copytree(frames_folder("idefics3"), tmp_path / "copy")
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["model_type"] = "idefics3"
    (folder / "config.json").write_text(json.dumps(values))
    copy, whole = load(folder).encoder.tower.state_dict(), load(frames_folder("idefics3")).encoder.tower.state_dict()
    assert copy.keys() == whole.keys()
    assert all(torch.equal(copy[name], whole[name]) for name in copy)


def test_a_missing_weight_of_the_projector_is_reported(setup: Setup, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in setup.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lacking = next(name for name in weights if any(part in name for part in PROJECTORS))
    weights.pop(lacking)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weights, first: {lacking.removeprefix('model.')}"):
        load(tmp_path)
