"""A run with an encoder that joins two frames: what is planned, cached and trained counts steps in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcap.assembly.model import describe_model
from vlmcap.config import Config
from vlmcap.demo.prepare import prepare
from vlmcap.errors import UserError
from vlmcap.planning.estimate.sizes import clip_sizes
from vlmcap.training.objects import Run

MakeConfig = Callable[..., Config]
VIDEO = ("encoder=tiny_vjepa2", "data.num_frames=4")
SHORT = (
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
def test_planned_tokens_and_frames_are_those_of_a_batch(
    frame_stack: int, make_run: Callable[[Config], Run], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, *VIDEO, *SHORT, "cache.enabled=false", f"projector.frame_stack={frame_stack}")
    sizes = clip_sizes(config)
    assert sizes.grid == (2, 8, 8)
    assert sizes.num_visual == (2 if frame_stack == 1 else 1)  # the grid is pooled to 2 × 2 and shuffled to 1
    run = make_run(config)
    run.data.setup("fit")
    batch = next(iter(run.data.train_dataloader()))
    assert set(batch.num_visual) == {sizes.num_visual}
    assert batch.frames[0].numel() == sizes.frame_bytes
    assert set(batch.grid_thw) == {sizes.grid}


@pytest.mark.parametrize("more", [(), pytest.param(("data.variable_frames=true",), marks=pytest.mark.slow)])
def test_losses_are_those_without_the_cache(
    more: tuple[str, ...], make_run: Callable[[Config], Run], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    found = [
        fit(make_run, tiny_config(tmp_path / cache[0], *VIDEO, *SHORT, *more, *cache))
        for cache in (["cache.enabled=false"], ["cache.enabled=true", "cache.dtype=float32"])
    ]
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
def test_the_tower_is_tuned(make_run: Callable[[Config], Run], tiny_config: MakeConfig, tmp_path: Path) -> None:
    run = make_run(tiny_config(tmp_path, *VIDEO, *SHORT, "cache.enabled=false", "tuning.encoder=lora"))
    before = {name: value.clone() for name, value in run.module.named_parameters() if "encoder" in name}
    run.trainer.fit(run.module, datamodule=run.data)
    moved = {name for name, value in run.module.named_parameters() if name in before and (value != before[name]).any()}
    assert moved and all("lora_" in name for name in moved)


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
        describe_model(prepare(tiny_config(tmp_path, *VIDEO, *overrides)))
