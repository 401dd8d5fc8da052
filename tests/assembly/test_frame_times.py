"""Whole models are given the times of the frames that they see.

In training, from stored features, and for files on the command line.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.assembling import assembled
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.data import build_data, training_lengths
from vlmcap.assembly.model import Assembly, check_context, describe_model
from vlmcap.compose import compose, from_plain, to_config, to_plain
from vlmcap.config import Config, Split
from vlmcap.data.decoding.video import write_video
from vlmcap.errors import UserError
from vlmcap.types import Batch, FrameTimes

SECONDS = re.compile(r"<(\d+\.\d) seconds>")


@pytest.fixture
def config(qwen_folders: dict[str, Path], aihub_root: Path, tmp_path: Path) -> Any:
    def make(kind: str, *overrides: str) -> Config:
        return compose(
            [
                f"model={kind}_{'8b' if kind == 'qwen3_vl' else '7b'}",
                f"model.checkpoint={qwen_folders[kind]}",
                "hardware=cpu",
                "data=aihub",
                f"data.root={aihub_root}",
                "data.num_frames=4",
                "data.num_workers=0",
                "data.batch_size=2",
                "encoder.max_patches=16",
                "llm.max_caption_tokens=48",
                "llm.max_new_tokens=2",
                f"paths.output_dir={tmp_path / 'run'}",
                f"paths.cache_dir={tmp_path / 'cache'}",
                *overrides,
            ]
        )

    return make


def film(folder: Path, num_frames: int = 40) -> Path:
    """10 frames per second."""
    noise = np.random.default_rng(0).integers(0, 255, (num_frames, 32, 48, 3)).astype(np.uint8)
    write_video(folder / "film.mp4", noise, fps=10)
    return folder / "film.mp4"


def seen(assembly: Assembly, path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """The batch that the captioner makes of a file."""
    batches: list[Batch] = []
    monkeypatch.setattr(assembly.captioner, "generate", lambda batch: batches.append(batch) or ["산이다."] * len(batch))
    assert assembly.captioner.caption([path]) == ["산이다."]
    return batches[0]


@pytest.mark.parametrize(
    ("num_frames", "overrides", "times_s"),
    [
        (40, (), (0.5, 1.5, 2.5, 3.5)),
        (40, ("data.sampling=fps", "data.fps=0.5"), (1.0, 1.0, 3.0, 3.0)),
        (8, ("data.num_frames=16",), tuple(index / 10 for index in range(8) for _ in range(2))),
        (7, ("data.num_frames=16", "data.variable_frames=true"), tuple(index / 10 for index in range(7))),
    ],
)
def test_files_are_captioned_with_their_times(
    config: Any,
    num_frames: int,
    overrides: tuple[str, ...],
    times_s: tuple[float, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assembly = assembled(config("qwen3_vl", "encoder.max_patches=4", *overrides))
    batch = seen(assembly, film(tmp_path, num_frames), monkeypatch)
    assert batch.times_s == (pytest.approx(times_s),)
    said = SECONDS.findall(assembly.captioner.prompt.tokenizer.decode(batch.input_ids[0]))
    assert said == [
        f"{(first + last) / 2:.1f}" for first, last in zip_longest(times_s[::2], times_s[1::2], fillvalue=times_s[-1])
    ]


def test_positions_go_by_times_of_files(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assembled(config("qwen2_5_vl"))
    batch, captioner = seen(assembly, film(tmp_path), monkeypatch), assembly.captioner
    with torch.no_grad():
        positions = captioner.language_inputs(batch, captioner.visual_tokens(batch))["position_ids"]
    temporal = positions[0, batch.visual_mask].unique().tolist()
    assert temporal[1] - temporal[0] == 4, "two seconds between temporal patches, and two positions per second"


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
def test_stored_features_come_with_their_times(kind: str, config: Any) -> None:
    batches, lengths = [], []
    for is_cached in ("false", "true"):
        chosen = config(
            kind,
            f"cache.enabled={is_cached}",
            *(["cache.dtype=float32"] if is_cached == "true" else []),
            "data.num_frames=2",
            "data.batching=by_length",
        )
        clips = load_splits(chosen, list(Split))
        torch.manual_seed(0)
        assembly = assembled(chosen, clips)
        data = build_data(chosen, assembly, clips)
        dataset = data.make_dataset(clips["train"])
        batches.append(data.train_collator([dataset[index] for index in range(6)]))
        lengths.append(training_lengths(chosen, assembly, clips["train"]))
    decoded, cached = batches
    assert decoded.frames is not None
    assert cached.features is not None
    assert cached.times_s == decoded.times_s == ((0.25, 0.75),) * 6, "four frames, four per second"
    assert cached.input_ids.tolist() == decoded.input_ids.tolist()
    real = cached.attention_mask.sum(1).numpy()
    assert lengths[1].tolist() == real.tolist()
    assert (lengths[0] >= real).all()


def test_the_bound_of_the_context_holds_for_a_clip_of_a_day(config: Any) -> None:
    chosen = config("qwen3_vl", "cache.enabled=false", "llm.max_caption_tokens=4")
    assembly = assembled(chosen)
    grids, num_prompt = describe_model(chosen).grids, assembly.captioner.prompt.num_prompt_tokens

    def longest(times_s: FrameTimes) -> int:
        return max(
            sum(part if isinstance(part, int) else len(part) for part in assembly.visual(grid, times_s))
            for grid in grids
        )

    late = longest((86_399.0,) * 4)
    assert late > longest((1.0,) * 4)
    context = late + num_prompt + 4
    check_context(chosen, assembly.visual, grids, assembly.captioner.prompt, context)
    with pytest.raises(UserError, match=f"exceed the context of {context - 1} tokens"):
        check_context(chosen, assembly.visual, grids, assembly.captioner.prompt, context - 1)


def test_a_run_keeps_the_form_of_its_prompt(config: Any) -> None:
    marks = {}
    for form in ("true", "false"):
        chosen = to_config(from_plain(to_plain(config("qwen3_vl", f"model.use_outer_marks={form}")), {}))
        prompt = describe_model(chosen).prompt
        text = prompt.tokenizer.decode([*prompt.prefix_ids, *prompt.suffix_ids])
        marks[form] = (text.count("<|vision_start|>"), text.count("<|vision_end|>"))
    assert marks == {"true": (1, 2), "false": (0, 1)}
