"""A clip with fewer frames than others in its batch gives the same result as alone, and padding is never encoded."""

from __future__ import annotations

import itertools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.projectors.settings import settings_of
from vlmcap.config import LlmConfig, MlpConfig, Temporal
from vlmcap.data.loading.collate import Collator
from vlmcap.errors import UserError
from vlmcap.models.captioner import VideoCaptioner
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.encoders import EncoderOptions, load_encoder
from vlmcap.models.encoders.preprocessing import StatedGrid
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.llm.prompt import VisualRun, load_prompt
from vlmcap.models.pretrained import load_pretrained
from vlmcap.models.projectors import ProjectorSizes, build_projector, count_tokens
from vlmcap.types import Clip, Sample

FRAMES = 4
LENGTHS = (4, 1, 3, 2)
PROJECTORS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "stacked": {"frame_stack": 2, "temporal": "position"},
    "attention": {"frame_stack": 2, "temporal": "attention"},
    "local_global": {"temporal": "local_global", "window": 3, "num_global": 2},
    "merge": {"reducer": "merge", "keep_ratio": 0.5},
    "saliency": {"reducer": "saliency", "keep_ratio": 0.3, "temporal": "position"},
    "cross_attention": {"kind": "cross_attention", "num_queries": 3, "temporal": "attention"},
    "prompt": {"kind": "cross_attention", "queries": "prompt"},
    "perceiver": {"kind": "perceiver", "num_queries": 5, "frame_stack": 2},
    "c_abstractor": {"kind": "c_abstractor", "num_queries": 4},
    "pixel_shuffle": {"kind": "pixel_shuffle"},
}


def load_llm(folder: Path) -> Any:
    return load_language_model(folder, dtype=torch.float32, quantization="none", attention="sdpa", device="cpu")


@pytest.fixture(params=PROJECTORS)
def captioner(request: pytest.FixtureRequest, siglip_folder: Path, llm_folder: Path) -> VideoCaptioner:
    encoder = load_encoder(siglip_folder, EncoderOptions(-1, torch.float32))
    prompt = load_prompt(llm_folder, LlmConfig(prompt="설명해 주세요."))
    options = {"kind": "mlp", "num_heads": 2, "num_layers": 2} | PROJECTORS[request.param]
    torch.manual_seed(0)
    projector = build_projector(
        settings_of(**options), ProjectorSizes(32, 64, (2, 2), FRAMES, len(prompt.question_ids))
    )
    return VideoCaptioner(encoder, projector, load_llm(llm_folder), prompt, GenerationSettings(4)).eval()


def noise(num_frames: int, height: int = 28, width: int = 28) -> Tensor:
    return torch.randint(
        0, 256, (num_frames, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_frames)
    )


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_loss_is_that_of_each_clip_alone(
    captioner: VideoCaptioner, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert captioner.encoder is not None
    grid_of = pickle.loads(pickle.dumps(StatedGrid(captioner.encoder.transform.grid_thw, captioner.encoder.grid)))
    visual = VisualRun(partial(count_tokens, captioner.projector.config, captioner.projector.sizes), (FRAMES, 2, 2))
    collator = Collator(captioner.prompt, visual, 200, is_packed=is_packed)
    items = [
        Sample(
            Clip(str(length), f"{length}.mp4", ("배" * (length + 1),)),
            frames=noise(length),
            grid_thw=grid_of(length, 90, 160),
        )
        for length in LENGTHS
    ]
    encoded = []
    encode = captioner.encoder.encode
    monkeypatch.setattr(
        captioner.encoder, "encode", lambda frames, sizes: encoded.append(len(frames)) or encode(frames, sizes)
    )
    loss, count = captioner(collator(items))
    assert encoded == [sum(LENGTHS)]
    alone = [captioner(Collator(captioner.prompt, visual, 200)([item])) for item in items]
    assert count == sum(count for _, count in alone)
    assert loss.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-6)
    # A clip that needs no grid of its own gives the same with one.
    plain = Collator(captioner.prompt, visual, 200)([Sample(items[0].clip, frames=items[0].frames)])
    assert captioner(plain)[0].item() == pytest.approx(alone[0][0].item(), rel=1e-6)


@torch.no_grad()
def test_captions_are_those_of_each_clip_alone(captioner: VideoCaptioner) -> None:
    visual = VisualRun(partial(count_tokens, captioner.projector.config, captioner.projector.sizes), (FRAMES, 2, 2))
    collator = Collator(captioner.prompt, visual, 200, mode="generate")
    items = [Sample(Clip(str(length), "", ()), frames=noise(length), grid_thw=(length, 2, 2)) for length in LENGTHS]
    assert captioner.generate(collator(items)) == [captioner.generate(collator([item]))[0] for item in items]


def test_the_stated_grid_is_the_encoders_own_where_it_varies() -> None:
    assert StatedGrid(lambda frames, height, width: None, (5, 6))(3, 100, 200) == (3, 5, 6)
    assert StatedGrid(lambda frames, height, width: (frames, height, width), (5, 6))(3, 100, 200) == (3, 100, 200)


def test_an_image_fills_its_stack() -> None:
    """An image equals a clip that shows it in every frame."""
    projector = build_projector(
        MlpConfig(temporal=Temporal.none, frame_stack=4),
        ProjectorSizes(in_dim=6, out_dim=8, grid=(2, 2), num_frames=FRAMES),
    )
    image = torch.randn(1, 1, 4, 6)
    torch.testing.assert_close(projector(image), projector(image.expand(-1, 4, -1, -1)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_temporal_patches_are_filled_up(kind: str, qwen_folders: dict[str, Path]) -> None:
    folder = qwen_folders[kind]
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "quantization": "none",
        "attention": "sdpa",
        "device": "cpu",
        "max_patches": 64,
    }
    parts = load_pretrained(folder, **options)
    around = {"visual_prefix": parts.visual_prefix, "visual_suffix": parts.visual_suffix}
    prompt = load_prompt(folder, LlmConfig(prompt="설명해 주세요."), **around)
    captioner = parts.captioner_class(parts.encoder, parts.projector, parts.llm, prompt, GenerationSettings(4)).eval()
    transform = parts.encoder.transform
    visual = parts.layout((FRAMES // 2, *parts.encoder.grid))

    def sample(frames: Tensor) -> Sample:
        clip = Clip(str(len(frames)), "", ("배" * len(frames),))
        return Sample(clip, frames=transform(frames), grid_thw=transform.grid_thw(len(frames), *frames.shape[-2:]))

    collator = Collator(prompt, visual, 200)
    sizes = itertools.cycle(((84, 112), (128, 56)))
    items = [sample(noise(length, *size)) for length, size in zip(LENGTHS, sizes, strict=False)]
    alone = [captioner(collator([item]))[0].item() for item in items]
    assert captioner(collator(items))[0].item() == pytest.approx(sum(alone), rel=1e-5)
    frames = noise(3)
    filled = torch.cat([frames, frames[-1:]])
    assert transform.grid_thw(3, 28, 28) == transform.grid_thw(4, 28, 28)
    assert torch.equal(transform(frames), transform(filled))
    with pytest.raises(UserError, match=r"data\.num_frames must be a multiple of 2, not 3"):
        parts.encoder.possible_grids(3)
