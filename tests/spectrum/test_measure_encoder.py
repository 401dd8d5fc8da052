"""`vlmcap spectrum` measures the features that a run would read, for every kind of encoder, and draws them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.checkpoints.encoders import Checkpoint
from vlmcap import cli
from vlmcap.compose import compose
from vlmcap.spectrum.figures import effective_rank, singular_values
from vlmcap.spectrum.measure_encoder import SpectrumSettings, measure_encoder


@pytest.fixture
def images(film: Tensor, tmp_path: Path) -> list[Path]:
    """Three frames of a film as files."""
    files = [tmp_path / f"frame{index}.png" for index in range(len(film))]
    for file, frame in zip(files, film, strict=True):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((160, 90)).save(file)
    return files


def overrides(checkpoint: Checkpoint, tmp_path: Path) -> list[str]:
    name = {"dinov3": "dinov3_s", "internvit": "internvit_300m", "siglip": "siglip2"}.get(
        checkpoint.family, checkpoint.family
    )
    paths = [f"encoder.checkpoint={checkpoint.folder}", f"paths.cache_dir={tmp_path / 'cache'}"]
    return [f"encoder={name}", *paths, "hardware=cpu", "data.num_frames=1", "encoder.feature_layer=-1"]


def is_picture(file: Path) -> bool:
    with Image.open(file) as picture:
        return picture.width > 500 and len(set(picture.convert("L").resize((64, 64)).getdata())) > 20


def test_the_figures_are_those_of_the_features(checkpoint: Checkpoint, images: list[Path], tmp_path: Path) -> None:
    config = compose(overrides(checkpoint, tmp_path))
    found = measure_encoder("own", config, SpectrumSettings(32, 8192, has_layers=True, images=tuple(images)))
    encoder = checkpoint.load(-1)
    frames = [encoder.transform(torch.from_numpy(_pixels(file))) for file in images]
    with torch.no_grad():
        features = encoder(torch.stack(frames))  # (3, 1, P, Dv)
    assert found.spectrum.effective_rank == pytest.approx(
        effective_rank(singular_values(features.flatten(0, 2))), rel=1e-3
    )
    assert torch.allclose(found.frame.patches, features[1, 0], atol=1e-4)
    assert (found.spectrum.prefix_norm is not None) == bool(encoder.num_prefix_tokens)
    assert found.spectrum.num_frames == 3
    assert list(found.layers) == [str(number) for number in range(1, len(found.layers) + 1)] and len(found.layers) > 1
    assert len({layer.effective_rank for layer in found.layers.values()}) > 1


def _pixels(file: Path) -> object:
    import numpy as np

    with Image.open(file) as picture:
        return np.asarray(picture).transpose(2, 0, 1)[None].copy()


@pytest.mark.slow
def test_encoders_are_compared(
    checkpoints: dict[str, Checkpoint], images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = checkpoints["clip"], tmp_path / "other"
    second.symlink_to(first.folder)
    given = [
        f"encoder.checkpoint={first.folder},{second}",
        *(o for o in overrides(first, tmp_path) if "checkpoint" not in o),
    ]
    out = tmp_path / "out"
    cli.main(["spectrum", *given, "--images", *map(str, images), "--output", str(out)])
    record = json.loads((out / "spectrum.json").read_text(encoding="utf-8"))
    one, two = record.values()
    assert one == two, "the same weights"
    assert one["correlation"][0] == 1 and len(one["singular_values"]) == min(one["tokens"], one["width"])
    output = capsys.readouterr().out
    assert "participation" in output and "correlation" in output and "…" in output, (
        "whole words, and the end of a long name"
    )
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == 3 and out / "comparison.png" in pictures
    assert all(map(is_picture, pictures))


def test_clips_of_the_data_are_looked_at(checkpoints: dict[str, Checkpoint], aihub_root: Path, tmp_path: Path) -> None:
    given = [*overrides(checkpoints["dinov3"], tmp_path), "data=aihub", f"data.root={aihub_root}", "data.num_frames=2"]
    found = measure_encoder("own", compose(given), SpectrumSettings(2, 10, has_layers=False, images=()))
    assert (found.spectrum.num_frames, found.spectrum.num_tokens) == (4, 10)
