"""Qwen-VL models as components match transformers' classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints.pretrained import VISION
from vlmcap.config import EvaluationConfig, LlmConfig
from vlmcap.data.loading.collate import Collator
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.prompt import load_prompt
from vlmcap.models.pretrained import VlmComponents, load_pretrained
from vlmcap.models.pretrained.families import FAMILIES, model_class
from vlmcap.types import Batch, Clip, Sample

KINDS = tuple(VISION)
FRAMES = 4
CAPTIONS = ("푸른 바다 위로 아침 해가 천천히 떠오른다.", "산이다.")
SIZES = ((84, 112), (128, 56))  # pixels: other grids, other lengths
RATES = (10.0, 2.0)  # frames per second of the files, of which these are taken:
TAKEN = ((5, 15, 25, 35), (3, 9, 15, 21))
LENGTHS = (40, 24)  # frames of the files
TIMES_S = tuple(tuple(index / rate for index in taken) for taken, rate in zip(TAKEN, RATES, strict=True))


@dataclass(frozen=True)
class Setup:
    """A captioner from the components of a kind, and its reference: transformers' processor and model."""

    kind: str
    parts: VlmComponents
    captioner: VideoCaptioner
    processor: Any
    reference: Any

    def batch(self, mode: str = "train", rows: tuple[int, ...] = (0, 1)) -> Batch:
        visual = self.parts.layout((FRAMES // 2, *self.parts.encoder.grid))
        samples = []
        for row in rows:
            frames = clip(row)
            grid = self.parts.encoder.transform.grid_thw(FRAMES, *frames.shape[-2:])
            own = Clip(str(row), f"{row}.mp4", (CAPTIONS[row],))
            samples.append(
                Sample(own, frames=self.parts.encoder.transform(frames), grid_thw=grid, times_s=TIMES_S[row])
            )
        return Collator(self.captioner.prompt, visual, 200, mode=mode)(samples)  # type: ignore[arg-type]

    def reference_inputs(self, batch: Batch, rows: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
        """Returns the output of transformers' processor for the same resized frames, times and text."""
        inputs = self.processed(batch, rows)
        assert ("second_per_grid_ts" in inputs) == (self.kind == "qwen2_5_vl")
        return inputs

    def processed(self, batch: Batch, rows: tuple[int, ...]) -> dict[str, Any]:
        from transformers.video_utils import VideoMetadata

        prompt = self.captioner.prompt
        tokenizer, text = prompt.tokenizer, FAMILIES[self.kind].text
        before, after = (text.before[-len("<|vision_start|>") :], text.after)  # without the time of a frame
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{before}<|video_pad|>{after}설명해 주세요."}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        is_train = batch.labels is not None
        end = tokenizer.convert_ids_to_tokens(prompt.end_id)
        return dict(
            self.processor(
                text=[rendered + (CAPTIONS[row] + end if is_train else "") for row in rows],
                videos=[self.pixels(row) for row in rows],
                video_metadata=[
                    VideoMetadata(total_num_frames=LENGTHS[row], fps=RATES[row], frames_indices=list(TAKEN[row]))
                    for row in rows
                ],
                return_tensors="pt",
                padding=True,
                padding_side="right" if is_train else "left",
            )
        )

    def pixels(self, row: int) -> Tensor:
        """Normalised float32 frames (F, 3, H, W)."""
        transform, values = self.parts.encoder.transform, FAMILIES[self.kind].preprocessing
        frames = clip(row)
        _, rows, columns = transform.grid_thw(FRAMES, *frames.shape[-2:])
        size = (rows * transform.patch_size, columns * transform.patch_size)
        if frames.shape[-2:] != size:
            frames = torch.nn.functional.interpolate(frames, size, mode="bicubic", antialias=True)
        mean, std = (torch.tensor(value).view(3, 1, 1) * 255 for value in (values.mean, values.std))
        return (frames.float() - mean) / std


def clip(row: int) -> Tensor:
    return torch.randint(
        0, 256, (FRAMES, 3, *SIZES[row]), dtype=torch.uint8, generator=torch.Generator().manual_seed(row)
    )


def load(folder: Path, **changes: Any) -> VlmComponents:
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "quantization": "none",
        "attention": "sdpa",
        "device": "cpu",
        "max_patches": 64,
    }
    return load_pretrained(folder, **options | changes)


def join(parts: VlmComponents, folder: Path, **settings: Any) -> VideoCaptioner:
    prompt = load_prompt(
        folder, LlmConfig(prompt="설명해 주세요."), visual_prefix=parts.visual_prefix, visual_suffix=parts.visual_suffix
    )
    generation = GenerationSettings(max_new_tokens=6, rules=EvaluationConfig(**settings))
    captioner = parts.captioner_class(parts.encoder, parts.projector, parts.llm, prompt, generation)
    return captioner.eval()


@pytest.fixture(scope="module", params=KINDS)
def setup(request: pytest.FixtureRequest, qwen_folders: dict[str, Path], qwen_processors: dict[str, Any]) -> Setup:

    folder = qwen_folders[request.param]
    parts = load(folder)
    reference = model_class(request.param).from_pretrained(folder).eval()
    return Setup(request.param, parts, join(parts, folder), qwen_processors[request.param], reference)


@torch.no_grad()
def logits(captioner: VideoCaptioner, batch: Batch) -> Tensor:
    llm: Any = captioner.llm
    return llm(**captioner.language_inputs(batch, captioner.visual_tokens(batch)), use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["train", "generate"])
def test_prompts_are_the_processors(setup: Setup, mode: str) -> None:
    batch, video = setup.batch(mode), setup.reference.config.video_token_id
    inputs = setup.processed(batch, (0, 1))
    assert batch.input_ids.masked_fill(batch.visual_mask, video).tolist() == inputs["input_ids"].tolist()
    assert batch.attention_mask.tolist() == inputs["attention_mask"].tolist()
    assert batch.grid_thw == tuple(tuple(grid) for grid in inputs["video_grid_thw"].tolist())


@torch.no_grad()
def test_times_reach_the_positions_or_the_prompt(setup: Setup) -> None:
    """Qwen2.5-VL encodes times in positions and Qwen3-VL in the prompt; Qwen2-VL does not use them."""
    batch = setup.batch(rows=(0,))
    inputs = setup.captioner.language_inputs(batch, setup.captioner.visual_tokens(batch))
    other = replace(batch, times_s=((0.0, 0.5, 1.0, 1.5),))
    others = setup.captioner.language_inputs(other, setup.captioner.visual_tokens(other))
    if "mrope" in FAMILIES[setup.kind].kind:
        assert torch.equal(inputs["position_ids"], others["position_ids"]) == (setup.kind != "qwen2_5_vl")
    texts = [setup.captioner.prompt.tokenizer.decode(row) for row in setup.batch("generate").input_ids]
    for text, said in zip(texts, (("<1.0 seconds>", "<3.0 seconds>"), ("<3.0 seconds>", "<9.0 seconds>")), strict=True):
        assert all((time in text) == setup.kind.startswith("qwen3") for time in said)


@torch.no_grad()
def test_logits_are_the_references(setup: Setup, record_property: Callable[[str, object], None]) -> None:
    batch = setup.batch()
    expected = setup.reference(**setup.reference_inputs(batch)).logits
    real = batch.attention_mask.bool()
    ours = logits(setup.captioner, batch)
    record_property(f"parity:model:{setup.kind}", (ours - expected)[real].abs().max().item())
    torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_logits_depend_on_the_video_and_on_its_order(setup: Setup) -> None:
    """Otherwise parity would be vacuous."""
    batch = setup.batch(rows=(0,))
    assert batch.frames is not None
    end = batch.attention_mask.sum() - 1
    first = logits(setup.captioner, batch)[0, end]
    for changed in (batch.frames.flip(1), 255 - batch.frames):
        assert (logits(setup.captioner, replace(batch, frames=changed))[0, end] - first).abs().max() > 1e-2


@torch.no_grad()
def test_loss_is_the_references(setup: Setup) -> None:
    batch = setup.batch()
    loss, count = setup.captioner(batch)
    expected = setup.reference(**setup.reference_inputs(batch), labels=batch.labels).loss
    assert count == batch.num_label_tokens
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_captions_are_the_references(setup: Setup, qwen_folders: dict[str, Path], beams: int) -> None:
    """Prompts of different lengths with left padding; the reference sees the raw pixels."""
    captioner = setup.captioner
    captioner.generation = replace(captioner.generation, rules=EvaluationConfig(num_beams=beams))
    batch = setup.batch("generate")
    assert batch.attention_mask.min() == 0
    stop = {"eos_token_id": captioner.prompt.stop_ids, "pad_token_id": captioner.prompt.pad_id}
    arguments = captioner.generation.as_arguments() | stop
    ours = captioner.llm.generate(**captioner.language_inputs(batch, captioner.visual_tokens(batch)), **arguments)  # type: ignore[operator]
    theirs = setup.reference.generate(**setup.reference_inputs(batch), **arguments)[:, batch.input_ids.shape[1] :]
    assert ours.tolist() == theirs.tolist()
    assert ours[0].tolist() != ours[1].tolist()
    assert captioner.generate(batch) == captioner.prompt.decode(theirs.tolist())


@pytest.mark.parametrize("beams", [1, 2])
def test_captions_of_two_are_those_of_one_and_one(setup: Setup, beams: int) -> None:
    setup.captioner.generation = replace(setup.captioner.generation, rules=EvaluationConfig(num_beams=beams))
    both = setup.captioner.generate(setup.batch("generate"))
    assert both == [setup.captioner.generate(setup.batch("generate", (row,)))[0] for row in (0, 1)]
    setup.captioner.generation = replace(setup.captioner.generation, num_slots=1)
    assert setup.captioner.generate(setup.batch("generate")) == both
    setup.captioner.generation = replace(setup.captioner.generation, num_slots=None)


def test_training_after_generation_has_fresh_positions(setup: Setup) -> None:
    """transformers keeps the position offset of the last generation in the model."""
    before = setup.captioner(setup.batch())[0].item()
    setup.captioner.generate(setup.batch("generate", (1,)))
    assert setup.captioner(setup.batch())[0].item() == before


def test_visual_tokens_are_encoded_once_for_all_beams(setup: Setup) -> None:
    calls = []
    handles = [
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        for part in (setup.parts.encoder, setup.parts.projector.mergers[0])
    ]
    setup.captioner.generation = replace(setup.captioner.generation, rules=EvaluationConfig(num_beams=3))
    setup.captioner.generate(setup.batch("generate", (0,)))
    for handle in handles:
        handle.remove()
    assert len(calls) == 2


def test_features_of_the_cache_give_what_frames_give(setup: Setup) -> None:
    """Features include DeepStack's layers after the last one."""
    batch = setup.batch()
    assert batch.frames is not None
    features = setup.captioner.encode(batch)
    assert features.shape[-1] == setup.parts.encoder.embed_dim == (96 if setup.kind.startswith("qwen3_vl") else 32)
    cached = replace(batch, frames=None, features=features)
    assert setup.captioner(cached)[0].item() == pytest.approx(setup.captioner(batch)[0].item(), rel=1e-6)


def test_every_used_weight_is_there_once(setup: Setup) -> None:
    names = [name for name, _ in setup.captioner.named_parameters(remove_duplicate=False)]
    assert {name.split(".")[0] for name in names} == {"encoder", "projector", "llm"}
    count = sum(parameter.numel() for parameter in setup.captioner.parameters())
    assert len(names) == len(list(setup.reference.named_parameters(remove_duplicate=False)))  # a head may be tied
    assert count == sum(parameter.numel() for parameter in setup.reference.parameters())
    trained = {name.split(".")[0] for name, parameter in setup.captioner.named_parameters() if parameter.requires_grad}
    assert trained == {"projector"}
    assert not any("merger" in name for name in names if not name.startswith("projector."))
