"""Pretrained VLMs whose frames keep their aspect ratio are planned with the tokens that run, in packed rows too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.pretrained import VISION
from tests.thinned import thinned
from vlmcap.config import Config
from vlmcap.models.pretrained import load_pretrained
from vlmcap.planning.estimate.memory_profiler import MemoryProfiler
from vlmcap.planning.estimate.sizes import clip_sizes
from vlmcap.planning.known_data import planned

FRAMES, MAX_PATCHES = 4, 64


def config_of(folder: Path, *overrides: str) -> Config:
    return planned(
        [
            "model=custom",
            f"model.checkpoint={folder}",
            "hardware=cpu",
            "data.root=unset",
            f"data.num_frames={FRAMES}",
            f"encoder.max_patches={MAX_PATCHES}",
            "llm.max_caption_tokens=64",
            "llm.max_new_tokens=64",
            *overrides,
        ]
    )


@pytest.mark.parametrize("kind", VISION)
@torch.no_grad()
def test_the_planned_tokens_are_those_that_run(kind: str, qwen_folders: dict[str, Path]) -> None:
    sizes = clip_sizes(config_of(qwen_folders[kind]))
    parts = load_pretrained(
        qwen_folders[kind],
        dtype=torch.float32,
        quantization="none",
        attention="sdpa",
        device="cpu",
        max_patches=MAX_PATCHES,
    )
    transform, (steps, rows, columns) = parts.encoder.transform, sizes.grid
    pixels = torch.zeros(FRAMES, 3, rows * transform.patch_size, columns * transform.patch_size, dtype=torch.uint8)
    assert transform.grid_thw(FRAMES, *pixels.shape[-2:]) == sizes.grid
    features = parts.encoder(transform(pixels)[None], [sizes.grid])
    assert features.shape[1:] == (steps, rows * columns, sizes.embed_dim)
    visual = parts.projector(features, grid=(rows, columns))
    layout = parts.layout(sizes.grid)(sizes.grid, tuple(float(86_000 + index) for index in range(FRAMES)))
    assert tuple(part for part in layout if isinstance(part, int)) == sizes.runs
    assert visual.shape[1] == sizes.num_visual == sum(sizes.runs)
    assert (sizes.gap > 0) == any(not isinstance(part, int) for part in layout)


@pytest.mark.parametrize("kind", thinned(["qwen2_5_vl", "qwen3_vl", "qwen3_5"], lambda kind: kind == "qwen2_5_vl"))
def test_packed_rows_are_planned(
    kind: str, qwen_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMCAP_CACHE_DIR", str(tmp_path))
    budget = "data.max_tokens_per_batch=400"
    packed, rows = (
        MemoryProfiler(config_of(qwen_folders[kind], budget, f"data.batching={batching}"), has_flash=True)
        for batching in ("packed", "by_length")
    )
    one, three = packed.language(1, 60), packed.language(3, 60)
    assert 2.9 * one.flops < three.flops, "three clips have three times the tokens"
    alike = rows.language(3, 60)
    # Attention is computed over the whole row, with a mask and so with repeated keys and values.
    assert alike.flops <= three.flops < 3 * alike.flops
    retained, own = sum(alike.retained.values()), sum(three.retained.values())
    assert retained <= own < 1.5 * retained
