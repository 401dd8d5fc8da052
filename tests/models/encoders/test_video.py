"""Encoders of whole clips match their class, and join two frames in everything that reads features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)

from tests.checkpoints.encoders import randomize
from vlmcap.config import LoraConfig
from vlmcap.errors import UserError
from vlmcap.models.encoders import EncoderOptions, VisionEncoder, build_encoder, load_encoder
from vlmcap.models.encoders.tower import add_tower_lora

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
VJEPA2 = {**SHAPE, "crop_size": 32, "pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
VIDEOMAE = {**SHAPE, "intermediate_size": 48, "image_size": 32, "num_frames": 8}
VIDEOMAE |= {"decoder_hidden_size": 24, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}

# The model as it is published, and its tower.
MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "vjepa2": lambda: pair(randomize(VJEPA2Model(VJEPA2Config(**VJEPA2)), 1), ""),
    "vjepa2 classifier": lambda: pair(randomize(VJEPA2ForVideoClassification(VJEPA2Config(**VJEPA2)), 2), "vjepa2"),
    "videomae": lambda: pair(
        randomize(VideoMAEForPreTraining(VideoMAEConfig(**VIDEOMAE, use_mean_pooling=False)), 3), "videomae"
    ),
    "videomae classifier": lambda: pair(
        randomize(VideoMAEForVideoClassification(VideoMAEConfig(**VIDEOMAE)), 4), "videomae"
    ),
}


def pair(model: Any, tower: str) -> tuple[Any, Any]:
    return model, getattr(model, tower) if tower else model


def load(folder: Path, layer: int = -1, **options: Any) -> VisionEncoder:
    return load_encoder(folder, EncoderOptions(layer, torch.float32, **options))


def frames_of(batch: int = 2, num_frames: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, num_frames, 3, size, size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def expected(tower: Any, encoder: VisionEncoder, frames: Tensor, layer: int) -> Tensor:
    """Returns the features of the class, (B, F, 3, S, S) -> (B, F / 2 · P, Dv)."""
    pixels = (frames.float() - encoder.mean) / encoder.std
    if isinstance(tower, VideoMAEModel):
        if frames.shape[1] != tower.config.num_frames:  # its positions are those of one length
            tower = VideoMAEModel(config_like(tower.config, frames.shape[1])).eval()
        outputs = tower(pixels, output_hidden_states=True)
    else:
        outputs = tower(pixels, skip_predictor=True, output_hidden_states=True)
    found: Tensor = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    return found


def config_like(config: Any, num_frames: int) -> VideoMAEConfig:
    return VideoMAEConfig(**{**config.to_dict(), "num_frames": num_frames})


@pytest.fixture(params=list(MAKERS))
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """The tower, and the folder of the model that holds it."""
    model, tower = MAKERS[request.param]()
    model.save_pretrained(tmp_path)
    return tower.eval(), tmp_path


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
@torch.no_grad()
def test_features_are_those_of_the_class(
    published: tuple[Any, Path], layer: int, record_property: Callable[[str, object], None]
) -> None:
    tower, folder = published
    encoder, frames = load(folder, layer), frames_of(num_frames=8)
    features = encoder(frames)
    assert encoder.grid == (4, 4)
    assert encoder.possible_grids(8) == [(4, 4, 4)]
    assert features.shape == (2, 4, 16, 32)
    reference = expected(tower, encoder, frames, layer)
    error = (features.flatten(1, 2) - reference).abs().max().item()
    record_property(f"parity:encoder:{tower.config.model_type}", error)
    torch.testing.assert_close(features.flatten(1, 2), reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_clip_of_other_length_has_the_positions_of_its_frames(published: tuple[Any, Path]) -> None:
    tower, folder = published
    encoder, frames = load(folder), frames_of(num_frames=4)
    if isinstance(tower, VideoMAEModel):
        shorter = VideoMAEModel(config_like(tower.config, 4)).eval()
        shorter.load_state_dict(tower.state_dict())
        pixels = (frames.float() - encoder.mean) / encoder.std
        reference = shorter(pixels).last_hidden_state
    else:
        reference = expected(tower, encoder, frames, -1)
    torch.testing.assert_close(encoder(frames).flatten(1, 2), reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_clips_of_several_lengths_are_those_of_one_length_alone(published: tuple[Any, Path]) -> None:
    encoder, frames = load(published[1]), frames_of(3, 6)
    frames[0, 2:] = 0  # padding, which attention must not see
    features = encoder(frames, [(1, 4, 4), (3, 4, 4), (3, 4, 4)])
    assert features.shape == (3, 3, 16, 32)
    torch.testing.assert_close(features[0, :1], encoder(frames[:1, :2])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features[1:], encoder(frames[1:]), atol=1e-5, rtol=1e-5)
    assert not features[0, 1:].any()


@torch.no_grad()
def test_tokens_follow_each_other_in_time_and_row_by_row(published: tuple[Any, Path]) -> None:
    """Layer 0 is before any attention: a change in frame 3, row 1, column 2 reaches only patch 6 of step 1."""
    encoder, frames = load(published[1], 0), frames_of(1, 4)
    changed = frames.clone()
    changed[:, 3, :, 8:16, 16:24] = 255 - changed[:, 3, :, 8:16, 16:24]
    moved = (encoder(frames) - encoder(changed)).abs().amax(-1)[0]
    assert moved.nonzero().tolist() == [[1, 6]]


def test_what_the_features_do_not_need_is_not_loaded(published: tuple[Any, Path]) -> None:
    names = {name for name, _ in load(published[1], -2).named_parameters()}
    assert {name.split(".")[1] for name in names} == {"encoder"} | {
        name.split(".")[1] for name in names if "emb" in name
    }
    assert not any(word in name for name in names for word in ("predictor", "decoder", "layernorm.", "pooler"))
    blocks = {name.split(".layer.")[1].split(".")[0] for name in names if ".layer." in name}
    assert blocks == {"0", "1"}


def test_the_transform_fills_the_last_pair_and_states_steps(published: tuple[Any, Path]) -> None:
    transform = load(published[1]).transform
    film = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8)
    frames = transform(film)
    assert frames.shape == (4, 3, 32, 32)
    assert torch.equal(frames[3], frames[2])
    assert transform.grid_thw(3, 40, 60) == (2, 4, 4)


def test_frames_that_fill_no_pair_are_refused(published: tuple[Any, Path]) -> None:
    with pytest.raises(UserError, match=r"data\.num_frames must be a multiple of 2, not 3"):
        load(published[1]).possible_grids(3)


def test_tiles_are_refused(published: tuple[Any, Path]) -> None:
    with pytest.raises(UserError, match=r"encoder\.tiling=2 is not possible.*set encoder\.tiling=1"):
        load(published[1], max_tiles=2)


def test_more_frames_than_positions_are_refused() -> None:
    encoder = build_encoder({"model_type": "videomae", **VIDEOMAE}, EncoderOptions(-1, torch.float32))
    with pytest.raises(UserError, match=r"positions for 8 frames, so data\.num_frames cannot be 10"):
        encoder.possible_grids(10)
    with pytest.raises(UserError, match=r"encoder\.image_size=40 is not possible.*32 pixels only"):
        build_encoder({"model_type": "videomae", **VIDEOMAE}, EncoderOptions(-1, torch.float32, image_size=40))


@torch.no_grad()
def test_another_image_size_counts_positions_by_its_own_grid(tmp_path: Path) -> None:
    model = randomize(VJEPA2Model(VJEPA2Config(**VJEPA2)), 1)
    model.save_pretrained(tmp_path)
    larger = VJEPA2Model(VJEPA2Config(**{**VJEPA2, "crop_size": 48})).eval()
    larger.load_state_dict(model.state_dict())
    encoder, frames = load(tmp_path, image_size=48), frames_of(size=48)
    assert encoder.grid == (6, 6)
    reference = expected(larger, encoder, frames, -1)
    torch.testing.assert_close(encoder(frames).flatten(1, 2), reference, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"encoder\.image_size=4 is less than one patch"):
        load(tmp_path, image_size=4)


def test_adapters_and_checkpointing(published: tuple[Any, Path]) -> None:
    encoder = load(published[1])
    tower: Any = encoder.tower
    add_tower_lora(tower, LoraConfig(rank=2, alpha=4))
    tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    encoder.train()(frames_of(2, 4), [(1, 4, 4), (2, 4, 4)]).square().mean().backward()
    trained = {name: weight for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(weight.grad is not None for weight in trained.values())
