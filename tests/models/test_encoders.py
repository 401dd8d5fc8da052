"""Encoders against transformers' own models and image processors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmcap.errors import UserError
from vlmcap.models.encoders import LOADERS, FrameTransform, VisionEncoder


def reference(family: str, folder: Path) -> Any:
    from transformers import CLIPVisionModel, SiglipVisionModel

    return {"siglip": SiglipVisionModel, "clip": CLIPVisionModel}[family].from_pretrained(folder).eval()


def processor(family: str, folder: Path) -> Any:
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    return {"siglip": SiglipImageProcessor, "clip": CLIPImageProcessor}[family].from_pretrained(folder)


@pytest.fixture(params=["siglip", "clip"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, siglip_folder: Path, clip_folder: Path) -> Path:
    return {"siglip": siglip_folder, "clip": clip_folder}[family]


def load(family: str, folder: Path, layer: int = -1) -> VisionEncoder:
    return LOADERS[family](folder, feature_layer=layer, dtype=torch.float32).eval()


def picture(height: int, width: int) -> Tensor:
    """uint8 (3, H, W): smooth, with an edge, every corner different."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // width, y * 255 // height, np.where(x > width // 3, 200, 30)]
    return torch.from_numpy(np.stack(planes).astype(np.uint8))


def frames_of(size: int, batch: int = 2, frames: int = 3) -> Tensor:
    return torch.randint(0, 256, (batch, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def block_output(model: Any, pixels: Tensor, layer: int) -> Tensor:
    """What one block of the reference gives, caught on its way."""
    tower = getattr(model, "vision_model", model)
    caught: list[Any] = []
    handle = tower.encoder.layers[layer].register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    model(pixel_values=pixels)
    handle.remove()
    output = caught[0]
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_features_are_those_of_the_reference_block(family: str, folder: Path, layer: int) -> None:
    encoder, model = load(family, folder, layer), reference(family, folder)
    frames = frames_of(28)
    settings = processor(family, folder)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
    expected = block_output(model, (frames.flatten(0, 1) / 255 - mean) / std, layer)
    expected = expected[:, 1:] if family == "clip" else expected  # CLS is no patch
    features = encoder(frames)
    assert features.shape == (2, 3, encoder.num_patches, encoder.embed_dim) == (2, 3, 4, 32)
    torch.testing.assert_close(features.flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layers_differ(family: str, folder: Path) -> None:
    frames = frames_of(28)
    assert not torch.allclose(load(family, folder, -1)(frames), load(family, folder, -2)(frames), atol=1e-2)


@torch.no_grad()
def test_patches_are_in_row_major_order(family: str, folder: Path) -> None:
    """Layer 0 is before any attention, so a change in the upper right quarter reaches patch 1 of 4 alone."""
    encoder = load(family, folder, 0)
    frames = frames_of(28, batch=1, frames=1)
    changed = frames.clone()
    changed[..., :14, 14:] = 255 - changed[..., :14, 14:]
    difference = (encoder(frames) - encoder(changed)).abs().amax(-1).flatten()
    assert encoder.grid == (2, 2)
    assert difference.argmax() == 1
    assert difference[[0, 2, 3]].max() == 0 < difference[1]


@torch.no_grad()
def test_frames_do_not_mix(family: str, folder: Path) -> None:
    encoder, frames = load(family, folder), frames_of(28)
    torch.testing.assert_close(encoder(frames)[1, 2], encoder(frames[1:, 2:])[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (41, 53), (28, 28), (20, 30)])
def test_transform_and_normalisation_are_the_processors(family: str, folder: Path, height: int, width: int) -> None:
    encoder, frame = load(family, folder), picture(height, width)
    settings = processor(family, folder)
    expected = torch.as_tensor(np.asarray(settings(frame.permute(1, 2, 0).numpy(), return_tensors="np")["pixel_values"][0]))
    resized = encoder.transform(frame[None])
    assert resized.dtype == torch.uint8
    assert resized.shape == (1, 3, 28, 28)
    pixels = (resized[0].float() - encoder.mean) / encoder.std
    step = (1 / 255) / torch.tensor(settings.image_std).view(3, 1, 1)  # of one grey level
    assert ((pixels - expected).abs() / step).max() <= 2.01


def test_clip_cuts_the_centre_and_siglip_squeezes() -> None:
    frame = torch.zeros(1, 3, 56, 112, dtype=torch.uint8)
    frame[..., :28] = 255  # the left quarter is lost to a central square
    assert FrameTransform(28, is_cropped=True)(frame).float().mean() < 1
    squeezed = FrameTransform(28)(frame)[0, 0].float()
    assert squeezed.mean() == pytest.approx(255 / 4, abs=2)
    assert squeezed[:, :6].min() > 250


def test_the_processor_file_decides(siglip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(siglip_folder, tmp_path / "copy")
    assert load("siglip", folder).transform.resampling == "bilinear"
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "do_center_crop": true}')
    encoder = load("siglip", folder)
    assert encoder.transform == FrameTransform(28, "bicubic", is_cropped=True)
    assert encoder.mean.flatten().tolist() == [0, 0, 0]
    (folder / "preprocessor_config.json").unlink()
    assert load("siglip", folder).mean.flatten().tolist() == [127.5] * 3


def test_a_whole_siglip_gives_its_vision_tower(tmp_path: Path, siglip_folder: Path) -> None:
    """The hub's checkpoints hold both towers."""
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig

    vision = SiglipVisionConfig.from_pretrained(siglip_folder).to_dict()
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text | {"max_position_embeddings": 8}))
    whole.save_pretrained(tmp_path)
    encoder, frames = load("siglip", tmp_path), frames_of(28, 1, 1)
    with torch.no_grad():
        expected = block_output(whole.vision_model.eval(), frames[0] / 127.5 - 1, -1)
        torch.testing.assert_close(encoder(frames)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there(siglip_folder: Path, layer: int) -> None:
    with pytest.raises(UserError, match=r"encoder\.feature_layer must be in -3…2"):
        load("siglip", siglip_folder, layer)


def test_another_familys_checkpoint_is_refused(siglip_folder: Path, clip_folder: Path) -> None:
    for family, folder in (("clip", siglip_folder), ("siglip", clip_folder)):
        with pytest.raises(UserError, match=r"encoder\.family") as caught:
            load(family, folder)
        assert "\n" not in str(caught.value)


def test_missing_or_broken_weights_are_refused(siglip_folder: Path, tmp_path: Path) -> None:
    """transformers would fill a gap with random numbers."""
    folder = shutil.copytree(siglip_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load("siglip", folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"encoder\.checkpoint"):
        load("siglip", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"encoder\.checkpoint"):
        load("siglip", folder)
