"""A model that ignores videos loses nothing without them, one that looks does, and training is not affected."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.thinned import thinned
from vlmcap.compose import compose
from vlmcap.config import Config, Split
from vlmcap.errors import UserError
from vlmcap.metrics import score_captions
from vlmcap.training.callbacks.visual_reliance import visual_reliance_check
from vlmcap.training.callbacks.visual_reliance_scores import cost, is_near_zero, swap_order
from vlmcap.training.objects import Run
from vlmcap.training.run import evaluate, train
from vlmcap.training.run import test as run_test
from vlmcap.types import Batch, Clip

MakeConfig = Callable[..., Config]
MakeRun = Callable[[Config], Run]
ON = "callbacks.visual_reliance.enabled=true"


def make_clips(categories: Sequence[str], videos: Sequence[int] | None = None) -> list[Clip]:
    names = range(len(categories)) if videos is None else videos
    return [
        Clip(f"{row}", f"{video}.mp4", ("말",), category)
        for row, (category, video) in enumerate(zip(categories, names, strict=True))
    ]


def met(clips: Sequence[Clip], seed: int) -> tuple[list[int], int]:
    """The order, and the sum of what is bad about it."""
    order = swap_order(clips, seed)
    assert sorted(order) == list(range(len(clips)))
    assert all(place != other for place, other in enumerate(order))
    return order, sum(cost(clip, clips[other]) for clip, other in zip(clips, order, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_clip_keeps_its_video_or_its_category_where_that_can_be_avoided(seed: int) -> None:
    rng = random.Random(seed)
    for count in (2, 3, 7, 40):
        categories = [rng.choice("산산산강바") for _ in range(count)]
        largest = max(Counter(categories).values())
        _, bad = met(make_clips(categories), seed)
        assert bad == max(0, 2 * largest - count), "so many of the largest group must meet their own"
        _, bad = met(make_clips([""] * count), seed)
        assert bad == 0
    videos = [0, 0, 0, 1, 1, 2, 3, 4]
    assert met(make_clips([""] * 8, videos), seed)[1] == 0, "captions of one video are exchanged with those of others"
    assert met(make_clips(["산"] * 8, videos), seed)[1] == 8, "eight times the category, and never the video"
    assert met(make_clips("산산산강강강산산", videos), seed)[1] == 2
    assert met(make_clips([""] * 2, [0, 0]), seed)[1] == 2000, "nothing else is there"


def test_the_order_is_the_seeds() -> None:
    clips = make_clips([""] * 30)
    assert swap_order(clips, 1) == swap_order(clips, 1) != swap_order(clips, 2)


def test_a_drop_is_near_zero_if_it_is_small_and_may_be_chance() -> None:
    losses = [1.0, 2.0, 3.0]
    assert is_near_zero(losses, [0.0, 0.0, 0.0])
    assert is_near_zero(losses, [1.0, -1.0, 0.1])
    assert is_near_zero(losses, [-1.0, -1.1, -0.9]), "better with another's video is no looking"
    assert not is_near_zero(losses, [1.0, 1.1, 0.9])
    assert not is_near_zero(losses, [0.011, 0.01, 0.009]), "small, but not chance"
    assert not is_near_zero(losses, [3.0, -1.0, 0.5]), "it may be chance, but a drop of 40% is not near zero"


# --- the callback in a run


def look(run: Run, split: Split = Split.test) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores `visual_reliance/*` of a split and what was written."""
    scores = run_test(run, split)
    name = split.value
    text = (run.folder / "predictions" / "visual_reliance" / f"{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {
        key.removeprefix(f"{name}/visual_reliance/"): value
        for key, value in scores.items()
        if "/visual_reliance/" in key
    }, rows


@pytest.mark.parametrize("cache", thinned(["true", "false"], lambda cache: cache == "true"))
def test_a_model_that_ignores_the_video_loses_nothing_and_is_told(
    cache: str, tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tiny_config(tmp_path, ON, f"cache.enabled={cache}"))
    run.module.captioner.projector.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    scores, rows = look(run)
    drops = {name: value for name, value in scores.items() if name.endswith(("_drop", "loss_rise"))}
    names = {
        f"{video}/{drop}" for video in ("swapped", "blanked") for drop in ("cider_drop", "facts_drop", "loss_rise")
    }
    assert drops == dict.fromkeys(names, 0.0)
    assert scores["is_blind"] == 1
    assert all(row["own"]["prediction"] == row["swapped"]["prediction"] == row["blanked"]["prediction"] for row in rows)
    assert "Warning: test: the captions do not depend on the video" in capsys.readouterr().out


def test_a_model_that_looks_loses_what_other_captions_score(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tiny_config(tmp_path, ON, "cache.enabled=false"))
    clips = run.data.clips["test"]
    dataset: Any = run.data.make_dataset(clips)
    captions = {dataset[row].frames.numpy().tobytes(): clip.captions[0] for row, clip in enumerate(clips)}

    def generate(batch: Batch) -> list[str]:
        assert batch.frames is not None
        return [captions.get(frames.numpy().tobytes(), "검은 화면이다.") for frames in batch.frames]

    run.module.captioner.generate = generate  # type: ignore[method-assign]
    scores, rows = look(run)
    by_video = {clip.video: clip.captions[0] for clip in clips}
    texts = [by_video[row["swapped_video"]] for row in rows]
    assert [row["swapped"]["prediction"] for row in rows] == texts
    assert {row["blanked"]["prediction"] for row in rows} == {"검은 화면이다."}, "really black frames"
    assert scores["swapped/cider"] == pytest.approx(
        score_captions(texts, [clip.captions for clip in clips], metrics=["cider"])["cider"]
    )
    assert scores["own/cider"] == pytest.approx(10)
    assert (
        scores["swapped/cider_drop"] == pytest.approx(10 - scores["swapped/cider"]) and scores["swapped/cider_drop"] > 2
    )
    assert scores["own/facts/mean"] == 1 > scores["swapped/facts/mean"] > scores["blanked/facts/mean"] == 0
    assert scores["is_blind"] == 0
    assert "Warning: test: the captions do not" not in capsys.readouterr().out


def test_the_loss_alone_says_it_too(tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(
        tiny_config(
            tmp_path,
            ON,
            "callbacks.visual_reliance.mode=loss",
            "cache.enabled=false",
            "callbacks.visual_reliance.max_clips=5",
        )
    )
    clips = run.data.clips["test"]
    dataset: Any = run.data.make_dataset(clips)
    frames = {clip.id: dataset[row].frames for row, clip in enumerate(clips)}

    def forward(batch: Batch) -> tuple[Tensor, int]:
        assert batch.frames is not None
        is_own = torch.equal(batch.frames[0], frames[batch.clips[0].id])
        is_black = not batch.frames.any()
        return torch.tensor(2.0 if is_own else 8.0 if is_black else 6.0 + int(batch.clips[0].id[-1]) / 10), 2

    def generate(batch: Batch) -> list[str]:
        return ["말"] * len(batch)

    run.module.captioner.forward, run.module.captioner.generate = forward, generate  # type: ignore[method-assign]
    scores, rows = look(run)
    assert scores == pytest.approx(
        {
            "own/loss": 1.0,
            "swapped/loss": 3.1,
            "blanked/loss": 4.0,
            "swapped/loss_rise": 2.1,
            "blanked/loss_rise": 3.0,
            "is_blind": 0.0,
        }
    )
    assert [set(row["own"]) for row in rows] == [{"loss"}] * 5
    assert rows[3]["swapped"]["loss"] == 3.15


@pytest.mark.slow
def test_black_features_are_those_of_black_frames(tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path) -> None:
    found = []
    for cache in (["cache.enabled=true", "cache.dtype=float32"], ["cache.enabled=false"]):
        config = tiny_config(tmp_path / cache[0], ON, *cache)
        scores, _ = look(make_run(config))
        found.append({name: value for name, value in scores.items() if "loss" in name})
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)
    assert len({round(found[0][f"{name}/loss"], 5) for name in ("own", "swapped", "blanked")}) == 3


@pytest.mark.slow
def test_training_goes_on_as_if_nothing_had_been_asked(
    straight_run: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """Resumed in the middle, with sampling and dropout, so that each random number drawn would show."""
    folder = tmp_path / "run"
    overrides = (
        "tuning.lora.dropout=0.1",
        ON,
        "callbacks.visual_reliance.every_n_validations=2",
        "evaluation.max_clips=6",
    )
    train(tiny_config(folder, *overrides, "trainer.max_steps=5"))
    train(tiny_config(folder, *overrides, "checkpoint=last"))
    mine, other = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (folder, straight_run))
    assert all(torch.equal(mine["state_dict"][name], tensor) for name, tensor in other["state_dict"].items())
    assert torch.equal(mine["vlmcap"]["random"]["torch"], other["vlmcap"]["random"]["torch"])
    assert mine["vlmcap"]["random"]["python"] == other["vlmcap"]["random"]["python"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    epochs = {row["epoch"] for row in rows if "val/visual_reliance/swapped/cider_drop" in row}
    assert epochs == {1, 2}, "every second validation by the epoch, also where the run stopped in it, and at the end"
    names = {path.name for path in (folder / "predictions" / "visual_reliance").iterdir()}
    assert names == {"val-epoch=01.jsonl", "val.jsonl", "test.jsonl"}
    scores = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["scores"]
    assert {
        "val/visual_reliance/own/cider",
        "test/visual_reliance/blanked/loss_rise",
        "val/visual_reliance/swapped/facts_drop",
    } <= scores.keys()
    lines = (folder / "predictions" / "visual_reliance" / "val-epoch=01.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6, "no more than are captioned"
    said = {
        row["id"]: row
        for row in map(json.loads, (folder / "predictions" / "val-epoch=01.jsonl").read_text("utf-8").splitlines())
    }
    assert all(said[row["id"]]["prediction"] == row["own"]["prediction"] for row in map(json.loads, lines))


def test_sampled_captions_draw_nothing_from_training(
    tiny_config: MakeConfig, make_run: MakeRun, tmp_path: Path
) -> None:
    states = []
    for visual_reliance in ("true", "false"):
        config = tiny_config(
            tmp_path / visual_reliance,
            f"callbacks.visual_reliance.enabled={visual_reliance}",
            "evaluation.do_sample=true",
        )
        run = make_run(config)
        run_test(run, Split.test)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_checkpoint_is_asked_afterwards(straight_run: Path, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "out", ON, "data.split=test")
    scores = evaluate(config, straight_run / "checkpoints" / "last.ckpt")
    assert "test/visual_reliance/swapped/cider_drop" in scores
    assert (tmp_path / "out" / "predictions" / "visual_reliance" / "test.jsonl").is_file()
    config = tiny_config(tmp_path / "vllm", ON, "evaluation.engine=vllm")
    with pytest.raises(UserError, match=r"callbacks\.visual_reliance measures the loss .*evaluation\.engine=native"):
        visual_reliance_check(config, None, None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_whole_model_is_asked_too(
    qwen_folders: dict[str, Path], aihub_root: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    overrides = ["model=qwen3_vl_8b", f"model.checkpoint={qwen_folders['qwen3_vl']}", "hardware=cpu", "data=aihub"]
    overrides += [f"data.root={aihub_root}"]
    sizes = [
        "data.num_frames=2",
        "data.num_workers=0",
        "data.batch_size=2",
        "data.eval_batch_size=2",
        "llm.max_new_tokens=4",
    ]
    paths = [f"paths.output_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}", "cache.enabled=true", ON]
    scores, rows = look(make_run(compose([*overrides, *sizes, *paths, "llm.max_caption_tokens=96"])))
    assert len(rows) == 2
    assert len({scores[f"{video}/loss"] for video in ("own", "swapped", "blanked")}) == 3
