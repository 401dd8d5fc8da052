"""Runs with an encoder that joins two frames, and with two encoders: what is planned, cached and trained agrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import assembling
from vlmcap.assembly.features import open_store, plans_of
from vlmcap.assembly.model import describe_model
from vlmcap.config import Config
from vlmcap.config_hash import config_hash
from vlmcap.demo.prepare import prepare
from vlmcap.errors import UserError
from vlmcap.planning.estimate.sizes import clip_sizes
from vlmcap.training.objects import Run

MakeConfig = Callable[..., Config]
# Encoder, steps in time of a clip of four frames, width.
ENCODERS = [("tiny_vjepa2", 2, 96), ("[tiny,tiny_vjepa2]", 4, 192), ("[tiny_vjepa2,tiny_dinov3]", 2, 192)]
SHORT = (
    "data.num_frames=4",
    "trainer.max_steps=2",
    "tuning.align_epochs=0",
    "tuning.epochs=1",
    "evaluation.every_n_epochs=9",
    "trainer.log_every_n_steps=1",
)


def fit(make_run: Callable[[Config], Run], config: Config) -> list[float]:
    run = make_run(config)
    run.trainer.fit(run.module, datamodule=run.data)
    lines = [json.loads(line) for line in (Path(config.paths.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize(("encoder", "steps", "width"), ENCODERS)
def test_planned_tokens_and_frames_are_those_of_a_batch(
    encoder: str,
    steps: int,
    width: int,
    frame_stack: int,
    make_run: Callable[[Config], Run],
    tiny_config: MakeConfig,
    tmp_path: Path,
) -> None:
    config = tiny_config(
        tmp_path, f"encoder={encoder}", *SHORT, "cache.enabled=false", f"projector.frame_stack={frame_stack}"
    )
    sizes = clip_sizes(config)
    assert (sizes.grid, sizes.embed_dim) == ((steps, 8, 8), width)
    assert sizes.num_visual == (steps if frame_stack == 1 else 1)  # the grid is pooled to 2 × 2 and shuffled to 1
    run = make_run(config)
    run.data.setup("fit")
    batch = next(iter(run.data.train_dataloader()))
    assert set(batch.num_visual) == {sizes.num_visual}
    assert batch.frames[0].numel() == sizes.frame_bytes
    features = run.module.captioner.encode(batch)
    assert features.shape[1:] == (steps, 64, width)
    if frame_stack == 1:
        cached = tiny_config(tmp_path / "cached", f"encoder={encoder}", *SHORT, "cache.dtype=float32")
        stored = make_run(cached).data
        stored.setup("fit")
        dataset: Any = stored.train_dataloader().dataset
        clips = {sample.clip.id: sample.features for sample in (dataset[index] for index in range(len(dataset)))}
        for clip, own in zip(batch.clips, features, strict=True):
            torch.testing.assert_close(clips[clip.id], own, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("data.variable_frames=true",)])
@pytest.mark.parametrize("encoder", [encoder for encoder, _, _ in ENCODERS])
def test_losses_are_those_without_the_cache(
    encoder: str, more: tuple[str, ...], make_run: Callable[[Config], Run], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    found = [
        fit(make_run, tiny_config(tmp_path / cache[0], f"encoder={encoder}", *SHORT, *more, *cache))
        for cache in (["cache.enabled=false"], ["cache.enabled=true", "cache.dtype=float32"])
    ]
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [encoder for encoder, _, _ in ENCODERS])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_towers_are_tuned(
    encoder: str, tuning: str, make_run: Callable[[Config], Run], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    overrides = (f"encoder={encoder}", *SHORT, "cache.enabled=false", f"tuning.encoder={tuning}")
    run = make_run(tiny_config(tmp_path, *overrides))
    parts: Any = run.module.captioner.encoder
    before = {name: value.clone() for name, value in parts.named_parameters()}
    run.trainer.fit(run.module, datamodule=run.data)
    moved = {name for name, value in parts.named_parameters() if (value != before[name]).any()}
    towers = {name.split("tower")[0] for name, _ in parts.named_parameters()}
    assert {name.split("tower")[0] for name in moved} == towers
    assert tuning == "full" or all("lora_" in name for name in moved)


def test_joined_encoders_are_stored_apart_under_the_keys_of_each_alone(tiny_config: MakeConfig, tmp_path: Path) -> None:
    def keys(encoder: str) -> list[str]:
        config = prepare(tiny_config(tmp_path, f"encoder={encoder}", "data.num_frames=4"))
        return [open_store(plan).key for plan in plans_of(describe_model(config).feature_plan)]

    assert keys("[tiny,tiny_vjepa2]") == [*keys("tiny"), *keys("tiny_vjepa2")]


@torch.no_grad()
def test_joined_features_are_those_of_each_side_by_side(tiny_config: MakeConfig, tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)

    def encoded(encoder: str) -> torch.Tensor:
        config = prepare(tiny_config(tmp_path, f"encoder={encoder}", "data.num_frames=4", "cache.enabled=false"))
        built: Any = assembling.assembled(config).captioner.encoder
        features: torch.Tensor = built(built.transform(frames)[None])
        return features

    first, second = encoded("tiny"), encoded("tiny_vjepa2")
    joined = encoded("[tiny,tiny_vjepa2]")
    torch.testing.assert_close(joined, torch.cat([first, second.repeat_interleave(2, dim=1)], dim=-1))
    joined = encoded("[tiny_vjepa2,tiny]")
    torch.testing.assert_close(joined, torch.cat([second, first.unflatten(1, (2, 2)).mean(2)], dim=-1))


def test_names_and_hashes_tell_joined_encoders_apart(tiny_config: MakeConfig, tmp_path: Path) -> None:
    found = [tiny_config(tmp_path, f"encoder={one}") for one in ("tiny", "[tiny,tiny_vjepa2]", "[tiny,tiny_dinov3]")]
    assert [config.component_names["encoder"] for config in found] == ["tiny", "tiny+tiny_vjepa2", "tiny+tiny_dinov3"]
    assert len({config_hash(config) for config in found}) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.num_frames=3", "projector.frame_stack=1"), r"data\.num_frames must be a multiple of 2, not 3"),
        (("projector.frame_stack=3",), r"projector\.frame_stack=3 splits the 2 frames that the encoder joins"),
        (("projector.frame_stack=8",), r"projector\.frame_stack=8 does not divide data\.num_frames=4"),
    ],
)
def test_settings_that_fill_no_pairs_are_refused(
    overrides: tuple[str, ...], message: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        describe_model(prepare(tiny_config(tmp_path, "encoder=tiny_vjepa2", "data.num_frames=4", *overrides)))
