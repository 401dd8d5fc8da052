"""Frames and tiles match transformers' image processors, and so do features of a frame of a real film."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoints.encoders import Checkpoint, hidden_state
from vlmcap.models.encoders import FrameTransform, VisionEncoder
from vlmcap.models.encoders.preprocessing import Preprocessing, TileTransform

SIZES = [(90, 160), (160, 90), (41, 53), (56, 56), (20, 30), (480, 640), (100, 37)]


def cut_from(film: Tensor, height: int, width: int) -> Tensor:
    """Returns a crop of real frames at full resolution, (3, 3, height, width)."""
    return film[..., 100 : 100 + height, 300 : 300 + width].contiguous()


def processed(checkpoint: Checkpoint, frames: Tensor) -> Tensor:
    """Returns the normalised pixels of the reference processor."""
    if (
        checkpoint.family == "dinov3"
    ):  # its processor rescales first and resizes in floating point, by torchvision, which is this call
        resized = F.interpolate(frames / 255, (64, 64), mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (checkpoint.processor.image_mean, checkpoint.processor.image_std)
        )
        return (resized - mean) / std
    images = [frame.permute(1, 2, 0).numpy() for frame in frames]
    return torch.from_numpy(np.stack(checkpoint.processor(images)["pixel_values"])).float()


def normalised(encoder: VisionEncoder, frames: Tensor) -> Tensor:
    return (frames.float() - encoder.mean) / encoder.std


def grey_levels(encoder: VisionEncoder, pixels: Tensor, expected: Tensor) -> float:
    """Returns the largest difference in units of 1/255."""
    return float(((pixels - expected) * encoder.std).abs().max())


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_pixels_and_features_are_those_of_processor_and_model(
    checkpoint: Checkpoint, film: Tensor, height: int, width: int
) -> None:
    encoder, frames = checkpoint.load(-2), cut_from(film, height, width)
    expected = processed(checkpoint, frames)
    resized = encoder.transform(frames)
    assert resized.dtype == torch.uint8
    assert grey_levels(encoder, normalised(encoder, resized), expected) <= 2.001
    features, reference = encoder(resized[None])[0], hidden_state(checkpoint, expected, -2)
    assert torch.cosine_similarity(features, reference, dim=-1).min() >= 0.999


@torch.no_grad()
def test_whole_frames_of_a_film(checkpoint: Checkpoint, film: Tensor) -> None:
    encoder, expected = checkpoint.load(-2), processed(checkpoint, film)
    resized = encoder.transform(film)
    assert grey_levels(encoder, normalised(encoder, resized), expected) <= 2.001
    assert (
        torch.cosine_similarity(encoder(resized[None])[0], hidden_state(checkpoint, expected, -2), dim=-1).min()
        >= 0.999
    )


def test_frames_are_resized_together_as_alone(checkpoint: Checkpoint, film: Tensor) -> None:
    transform, frames = checkpoint.load().transform, cut_from(film, 90, 160)
    assert torch.equal(transform(frames)[1], transform(frames[1:2])[0])


def test_clip_cuts_the_centre_and_siglip_squeezes() -> None:
    frame = torch.zeros(1, 3, 56, 112, dtype=torch.uint8)
    frame[..., :28] = 255  # the left quarter is lost to a central square
    assert FrameTransform(28, is_cropped=True)(frame).float().mean() < 1
    squeezed = FrameTransform(28)(frame)[0, 0].float()
    assert squeezed.mean() == pytest.approx(255 / 4, abs=2)
    assert squeezed[:, :6].min() > 250


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (41, 53)])
def test_a_cut_smaller_than_the_resized_frame(film: Tensor, height: int, width: int) -> None:
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=56, do_normalize=False, do_rescale=False)
    frames = cut_from(film, height, width)
    preprocessing = Preprocessing((0, 0, 0), (1, 1, 1)).updated(processor.to_dict())
    expected = np.stack(processor([frame.permute(1, 2, 0).numpy() for frame in frames])["pixel_values"])
    assert (preprocessing.image_size, preprocessing.short_side, preprocessing.is_cropped) == (56, 64, True)
    transform = FrameTransform(56, "bicubic", is_cropped=True, short_side=preprocessing.short_side_for(56))
    assert np.abs(transform(frames).numpy().astype(int) - expected).max() <= 2
    assert preprocessing.short_side_for(112) == 128


def test_the_processor_file_decides(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["siglip"].folder, tmp_path / "copy")
    checkpoint, file = Checkpoint("siglip", folder, None, None, 0), folder / "preprocessor_config.json"
    assert checkpoint.load().transform == FrameTransform(56, "bilinear")
    file.write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "do_center_crop": true}')
    encoder = checkpoint.load()
    assert encoder.transform == FrameTransform(56, "bicubic", is_cropped=True)
    assert encoder.mean.flatten().tolist() == [0, 0, 0]
    file.unlink()
    assert checkpoint.load().mean.flatten().tolist() == [127.5] * 3


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
        ("video_preprocessor_config.json", None),
        ("processor_config.json", "video_processor"),
    ],
)
def test_processor_files_of_whole_checkpoints(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, name: str, section: str | None
) -> None:
    folder = shutil.copytree(checkpoints["clip"].folder, tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    values: dict[str, Any] = {
        "image_mean": [0.1] * 3,
        "resample": 2,
        "crop_size": {"height": 56, "width": 56},
        "size": {"shortest_edge": 70},
    }
    (folder / name).write_text(json.dumps({section: values} if section else values))
    encoder = Checkpoint("clip", folder, None, None, 1).load()
    assert encoder.transform == FrameTransform(56, "bilinear", is_cropped=True, short_side=70)
    assert encoder.mean.flatten().tolist() == pytest.approx([25.5] * 3)


def test_the_processor_file_gives_dinov3_its_native_size(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["dinov3"].folder, tmp_path / "copy")
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 96, "width": 96}}')
    checkpoint = Checkpoint("dinov3", folder, None, None, 5)
    assert checkpoint.load().grid == (6, 6)
    (folder / "preprocessor_config.json").unlink()
    assert checkpoint.load().grid == (4, 4)


def test_transforms_go_to_other_processes(checkpoint: Checkpoint, naflex: Checkpoint) -> None:
    for encoder in (checkpoint.load(), checkpoint.load(max_tiles=4), naflex.load()):
        assert pickle.loads(pickle.dumps(encoder.transform)) == encoder.transform


TILED_SIZES = [(90, 160), (160, 90), (300, 300), (41, 53), (100, 37), (60, 600), (720, 1280)]


def reference_tiles(frames: Tensor, size: int, max_tiles: int, **settings: Any) -> Tensor:
    from transformers import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(
        size={"height": size, "width": size}, crop_to_patches=True, max_patches=max_tiles, **settings
    )
    return torch.from_numpy(
        np.stack(processor([frame.permute(1, 2, 0).numpy() for frame in frames])["pixel_values"])
    ).float()


@pytest.mark.parametrize(("height", "width"), TILED_SIZES)
@pytest.mark.parametrize("max_tiles", [2, 6, 12])
def test_tiles_are_those_of_the_processor(film: Tensor, height: int, width: int, max_tiles: int) -> None:
    frames = film[:2, :, :height, :width].contiguous()
    transform = TileTransform(28, (2, 2), max_tiles)
    tiles, expected = transform(frames), reference_tiles(frames, 28, max_tiles, do_rescale=False, do_normalize=False)
    assert tiles.dtype == torch.uint8
    assert tiles.shape == expected.shape
    assert (tiles.float() - expected).abs().max() <= 2
    assert transform.grid_thw(2, height, width) == (len(tiles), 2, 2)


@torch.no_grad()
def test_features_of_tiles(checkpoints: dict[str, Checkpoint], film: Tensor) -> None:
    checkpoint = checkpoints["internvit"]
    encoder = checkpoint.load(max_tiles=6)
    mean_and_std = {"image_mean": checkpoint.processor.image_mean, "image_std": checkpoint.processor.image_std}
    expected = hidden_state(checkpoint, reference_tiles(film[:2], 56, 6, **mean_and_std), -1)
    features = encoder(encoder.transform(film[:2])[None])[0]
    assert features.shape == expected.shape == (2 * 3, 16, 32)
    assert torch.cosine_similarity(features, expected, dim=-1).min() >= 0.999


@torch.no_grad()
def test_a_batch_of_clips_of_different_shape(checkpoint: Checkpoint, film: Tensor) -> None:
    """A batch of two equals two batches of one, and padding is not computed."""
    encoder = checkpoint.load(max_tiles=4)
    clips = [film[:2, :, :200, :200], film[:2, :, :100, :300]]
    tiles = [encoder.transform(clip) for clip in clips]
    grids = [encoder.transform.grid_thw(2, *clip.shape[-2:]) for clip in clips]
    assert grids == [(2, 4, 4), (8, 4, 4)] or grids == [(10, 4, 4), (8, 4, 4)]
    assert [len(clip) for clip in tiles] == [grid[0] for grid in grids if grid]
    longest = max(map(len, tiles))
    padded = torch.stack([torch.nn.functional.pad(clip, (0,) * 7 + (longest - len(clip),)) for clip in tiles])
    seen: list[int] = []
    encoder.tower.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    features = encoder(padded, grids)
    assert seen == [sum(map(len, tiles))]
    for row, clip in enumerate(tiles):
        torch.testing.assert_close(features[row, : len(clip)], encoder(clip[None])[0], atol=1e-5, rtol=1e-5)
        assert not features[row, len(clip) :].any()


def test_every_grid_of_a_clip_is_possible(checkpoint: Checkpoint) -> None:
    encoder = checkpoint.load(max_tiles=7)
    possible = encoder.possible_grids(3)
    sizes = np.random.default_rng(0).integers(16, 2000, (300, 2)).tolist()
    found = {encoder.transform.grid_thw(3, height, width) for height, width in sizes}
    assert found <= set(possible)
    assert len(found) > 4
    assert possible == [(3 * count, 4, 4) for count in (1, 3, 4, 5, 6, 7, 8)]
    assert encoder.max_tiles == 7
    assert checkpoint.load().possible_grids(3) == [(3, 4, 4)]
    assert checkpoint.load().transform.grid_thw(3, 100, 200) is None
