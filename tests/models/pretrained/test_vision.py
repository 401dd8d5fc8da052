"""The vision part of a whole model alone is the same encoder as that of the whole; a sketch of it holds no weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.pretrained import VISION
from vlmcap.errors import UserError
from vlmcap.models.pretrained import load_pretrained, load_vision, sketch_vision

OPTIONS: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa", "device": "cpu", "max_patches": 24}
KINDS = [*VISION, "llava_next_video"]


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, qwen_folders: dict[str, Path], llava_folder: Path) -> tuple[str, Path]:
    kind: str = request.param
    return kind, qwen_folders.get(kind, llava_folder)


def test_features_are_those_of_the_whole_model(case: tuple[str, Path]) -> None:
    kind, folder = case
    whole = load_pretrained(kind, folder, quantization="none", **OPTIONS).encoder
    alone = load_vision(kind, folder, **OPTIONS)
    assert alone.transform == whole.transform
    assert alone.possible_grids(4) == whole.possible_grids(4)
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    pixels = torch.randint(0, 256, (4, 3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid = alone.transform.grid_thw(4, 48, 64)
    with torch.no_grad():
        features, expected = (encoder(encoder.transform(pixels)[None], grid and [grid]) for encoder in (alone, whole))
    assert features.abs().max() > 0
    assert torch.equal(features, expected)


def test_a_sketch_has_the_sizes_and_no_weights(case: tuple[str, Path]) -> None:
    kind, folder = case
    sketch = sketch_vision(kind, folder, dtype=torch.float32, max_patches=24)
    loaded = load_vision(kind, folder, **OPTIONS)
    assert all(parameter.is_meta for parameter in sketch.parameters())
    assert (sketch.transform, sketch.embed_dim, sketch.grid) == (loaded.transform, loaded.embed_dim, loaded.grid)
    assert sketch.possible_grids(4) == loaded.possible_grids(4)
    assert sum(p.numel() for p in sketch.parameters()) == sum(p.numel() for p in loaded.parameters())


def test_a_missing_weight_of_the_tower_is_said(qwen_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_folders["qwen2_vl"], tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "visual.blocks.0" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_vision("qwen2_vl", folder, **OPTIONS)
    with pytest.raises(UserError, match="not qwen3_vl; choose the model="):
        sketch_vision("qwen3_vl", folder, dtype=torch.float32, max_patches=24)
