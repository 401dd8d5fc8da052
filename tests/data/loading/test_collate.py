"""Sequences are joined part by part.

Labels are exactly the caption, visual tokens are whole, nothing is lost silently.
"""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from vlmcap.data.loading.collate import Collator, ValidationCollator
from vlmcap.types import Batch, Clip, FrameTimes, GridTHW, Sample, Skipped


@dataclass
class CharPrompt:
    """A token a character; padding and end share an id, as in many language models."""

    prefix_ids: list[int] = field(default_factory=lambda: [2, 3])
    suffix_ids: list[int] = field(default_factory=lambda: [4, 5, 6])
    end_id: int = 1
    pad_id: int = 1

    def encode_caption(self, text: str) -> list[int]:
        return [ord(char) for char in text]


def decode(ids: torch.Tensor) -> str:
    return "".join(chr(i) for i in ids.tolist())


def make_sample(name: str, *captions: str, is_cached: bool = False) -> Sample:
    clip = Clip(name, f"{name}.mp4", captions)
    if is_cached:
        return Sample(clip, features=torch.ones(2, 4, 5))
    return Sample(clip, frames=torch.ones(2, 3, 4, 4, dtype=torch.uint8))


def collate(
    *items: Sample | Skipped, V: int = 7, limit: int = 20, mode: Literal["train", "generate"] = "train"
) -> Batch:
    return pickle.loads(pickle.dumps(Collator(CharPrompt(), V, limit, mode)))(list(items))


def test_labels_are_the_caption_and_its_end() -> None:
    captions = ["해가 뜬다.", "배", "눈이 내리는 궁궐이다."]
    batch = collate(*(make_sample(str(i), caption, "다른 글") for i, caption in enumerate(captions)))
    assert batch.labels is not None
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == batch.visual_mask.shape
    for i, caption in enumerate(captions):
        counted = batch.labels[i] != -100
        assert decode(batch.labels[i][counted][:-1]) == caption
        assert batch.labels[i][counted][-1] == 1
        assert torch.equal(batch.input_ids[i][counted], batch.labels[i][counted])
        length = 2 + 7 + 3 + len(caption) + 1
        assert batch.attention_mask[i].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert batch.input_ids[i, :12].tolist() == [2, 3, *[1] * 7, 4, 5, 6]
    assert batch.visual_mask.sum(dim=1).tolist() == [7, 7, 7]
    assert batch.visual_mask[:, 2:9].all()
    assert batch.num_label_tokens == sum(len(caption) + 1 for caption in captions)
    assert batch.frames is not None
    assert batch.frames.shape == (3, 2, 3, 4, 4)
    assert (batch.num_truncated, batch.features) == (0, None)


@pytest.mark.parametrize(
    ("length", "num_truncated", "has_end"), [(8, 0, True), (9, 0, True), (10, 1, False), (500, 1, False)]
)
def test_only_captions_are_cut(length: int, num_truncated: int, has_end: bool) -> None:
    batch = collate(make_sample("x", "가" * length), V=3000, limit=10)
    assert batch.labels is not None
    labels = batch.labels[batch.labels != -100].tolist()
    assert batch.num_truncated == num_truncated
    assert len(labels) == min(length + 1, 10)
    assert (labels[-1] == 1) == has_end
    assert int(batch.visual_mask.sum()) == 3000


def test_generation_ends_with_the_prompt() -> None:
    batch = collate(make_sample("a", "긴 글이다."), make_sample("b"), mode="generate")
    assert batch.labels is None
    assert batch.num_label_tokens == 0
    assert batch.input_ids.tolist() == [[2, 3, *[1] * 7, 4, 5, 6]] * 2
    assert batch.attention_mask.all()  # whatever would be padding stands on the left, and rows of one length need none
    assert batch.visual_mask.sum(dim=1).tolist() == [7, 7]


def layout(grid_thw: GridTHW | None, times_s: FrameTimes | None) -> list[int | list[int]]:
    """A placeholder for each patch, and a word between frames."""
    assert grid_thw is not None
    frames, height, width = grid_thw
    return [part for _ in range(frames) for part in (height * width, [9])]


def timed(grid_thw: GridTHW | None, times_s: FrameTimes | None) -> list[int | list[int]]:
    """A placeholder for a clip, and its times behind it."""
    return [1, [round(100 * time_s) for time_s in times_s or ()]]


def test_times_reach_the_prompt_and_the_batch() -> None:
    samples = [
        dataclasses.replace(sized(name, (2, 1, 1), True), times_s=times_s)
        for name, times_s in zip("ab", [(0.5, 7.25), None], strict=True)
    ]
    batch = Collator(CharPrompt(), timed, 20, "generate")(samples)
    assert batch.input_ids.tolist() == [[2, 3, 1, 50, 725, 4, 5, 6], [1, 1, 2, 3, 1, 4, 5, 6]]
    assert batch.times_s == ((0.5, 7.25), None)
    assert batch.select([1]).times_s == (None,)
    assert batch.select([1, 0]).times_s == (None, (0.5, 7.25))
    assert Collator(CharPrompt(), layout, 20)([sized("a", (2, 1, 1), True)]).times_s == ()


def sized(name: str, grid_thw: GridTHW, is_cached: bool) -> Sample:
    clip, (frames, height, width) = Clip(name, f"{name}.mp4", ("배",)), grid_thw
    tensor = torch.full((frames, height * width, 5), ord(name), dtype=torch.uint8)
    return Sample(clip, grid_thw=grid_thw, **{"features" if is_cached else "frames": tensor})


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("mode", ["train", "generate"])
def test_clips_of_their_own_sizes(mode: Literal["train", "generate"], is_cached: bool) -> None:
    grids: list[GridTHW] = [(2, 1, 3), (1, 2, 2)]
    batch = Collator(CharPrompt(), layout, 20, mode)(
        [sized(name, grid, is_cached) for name, grid in zip("ab", grids, strict=True)]
    )
    long, short = [2, 3, 1, 1, 1, 9, 1, 1, 1, 9, 4, 5, 6], [2, 3, 1, 1, 1, 1, 9, 4, 5, 6]
    caption = [ord("배"), 1] if mode == "train" else []
    pad = [1] * (len(long) - len(short))
    rows = [long + caption, (pad if mode == "generate" else []) + short + caption + (pad if mode == "train" else [])]
    assert batch.input_ids.tolist() == rows
    assert batch.visual_mask.sum(1).tolist() == [6, 4]
    assert batch.attention_mask.sum(1).tolist() == [len(long) + len(caption), len(short) + len(caption)]
    assert batch.attention_mask[1, 0 if mode == "generate" else -1] == 0  # the side that generation does not go on from
    assert bool((batch.input_ids[batch.visual_mask] == 1).all())
    if batch.labels is not None:
        assert [row[row != -100].tolist() for row in batch.labels] == [caption, caption]
    assert batch.grid_thw == tuple(grids)
    stacked = batch.features if is_cached else batch.frames
    assert stacked is not None
    assert stacked.shape == (2, 2, 4, 5)
    assert bool((stacked[0, :, :3] == ord("a")).all())
    assert bool((stacked[0, :, 3:] == 0).all())
    assert bool((stacked[1, 1] == 0).all())


@pytest.mark.parametrize("is_cached", [True, False])
def test_packed_clips_stand_one_behind_another(is_cached: bool) -> None:
    grids: list[GridTHW] = [(2, 1, 3), (1, 2, 2), (3, 1, 1)]
    items = [sized(name, grid, is_cached) for name, grid in zip("abc", grids, strict=True)]
    collator = pickle.loads(pickle.dumps(Collator(CharPrompt(), layout, 20, is_packed=True)))
    batch, rows = collator(items), Collator(CharPrompt(), layout, 20)(items)
    real = rows.attention_mask.bool()
    assert rows.labels is not None
    assert batch.labels is not None
    assert batch.position_ids is not None
    assert (len(batch), rows.position_ids) == (3, None)
    assert batch.clips == rows.clips
    # Each is what the rows hold without their padding, in their order, which is that of the visual tokens.
    for features, padded in (
        (batch.input_ids, rows.input_ids),
        (batch.labels, rows.labels),
        (batch.visual_mask, rows.visual_mask),
    ):
        assert features.shape == (1, int(real.sum()))
        assert torch.equal(features[0], padded[real])
    assert batch.attention_mask.all()
    assert batch.position_ids[0].tolist() == [place for length in real.sum(1).tolist() for place in range(length)]
    assert batch.num_label_tokens == rows.num_label_tokens
    assert batch.grid_thw == rows.grid_thw
    stacked, expected = (batch.features, rows.features) if is_cached else (batch.frames, rows.frames)
    assert stacked is not None
    assert expected is not None
    assert torch.equal(stacked, expected)
    moved = pickle.loads(pickle.dumps(batch)).to("meta")
    assert {moved.input_ids.device.type, moved.position_ids.device.type} == {"meta"}


def test_generation_is_never_packed() -> None:
    items = [make_sample("a", "글"), make_sample("b", "글")]
    packed, plain = (Collator(CharPrompt(), 7, 20, "generate", is_packed)(items) for is_packed in (True, False))
    assert packed.position_ids is None
    assert torch.equal(packed.input_ids, plain.input_ids)


def test_a_packed_batch_of_nothing_is_well_formed() -> None:
    batch = Collator(CharPrompt(), 7, 20, is_packed=True)([Skipped(Clip("bad", "bad.mp4", ()), "broken")])
    assert len(batch) == 0
    assert batch.position_ids is not None
    assert batch.input_ids.shape == batch.position_ids.shape == batch.visual_mask.shape == (0, 12)


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_no_token_of_its_clip_stands_before_is_no_label(is_packed: bool) -> None:
    collator = Collator(CharPrompt([], []), 0, 20, is_packed=is_packed)
    batch = collator([make_sample("a", "가나"), make_sample("b", "다")])
    assert batch.labels is not None
    expected = [[-100, ord("나"), 1], [-100, 1]]
    if is_packed:
        assert batch.labels.tolist() == [expected[0] + expected[1]]
    else:
        assert batch.labels.tolist() == [expected[0], [*expected[1], -100]]
    assert batch.num_label_tokens == 3


def test_samples_without_labels_are_named() -> None:
    unreadable = Skipped(Clip("bad", "bad.mp4", ("글",)), "broken")
    batch = collate(make_sample("empty", ""), unreadable, make_sample("good", "글"), make_sample("none"))
    assert [clip.id for clip in batch.clips] == ["good"]
    assert {skipped.clip.id: skipped.reason for skipped in batch.skipped} == {
        "bad": "broken",
        "empty": "clip empty has no caption to learn from: it is empty or gives no tokens",
        "none": "clip none has no caption to learn from: it is empty or gives no tokens",
    }


@pytest.mark.parametrize("mode", ["train", "generate"])
def test_a_batch_of_nothing_is_well_formed(mode: Literal["train", "generate"]) -> None:
    batch = collate(Skipped(Clip("bad", "bad.mp4", ()), "broken"), mode=mode)
    assert len(batch) == 0
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.visual_mask.shape == (0, 12)
    assert (batch.labels is None) == (mode == "generate")
    assert batch.num_label_tokens == 0
    assert (batch.frames, batch.features, len(batch.skipped)) == (None, None, 1)


def test_cached_features_are_stacked() -> None:
    batch = collate(make_sample("a", "가", is_cached=True), make_sample("b", "나", is_cached=True))
    assert batch.frames is None
    assert batch.features is not None
    assert batch.features.shape == (2, 2, 4, 5)


def test_lightning_moves_a_batch() -> None:
    moved = move_data_to_device(collate(make_sample("a", "가")), torch.device("meta"))
    assert isinstance(moved, Batch)
    assert moved.input_ids.device.type == "meta"
    assert moved.frames is not None
    assert moved.frames.device.type == "meta"
    assert moved.features is None


@pytest.mark.parametrize("arguments", [(-1, 5, "train"), (3, 0, "train"), (3, 5, "test")])
def test_impossible_settings(arguments: tuple[int, int, Literal["train"]]) -> None:
    with pytest.raises(ValueError):
        Collator(CharPrompt(), *arguments)


def test_places_and_numbers_are_those_of_the_masks() -> None:
    items = [make_sample("a", "배가 간다"), make_sample("b", "산"), make_sample("c", "")]
    batch = Collator(CharPrompt(), 7, 20)(items)
    flat = batch.input_ids.flatten()
    assert batch.targets is not None and batch.label_indices is not None and batch.labels is not None
    assert (
        batch.targets.tolist()
        == [ord(char) for char in "배가 간다"] + [1, ord("산"), 1]
        == flat[batch.label_indices + 1].tolist()
    )
    assert batch.labels.flatten()[batch.label_indices + 1].tolist() == batch.targets.tolist()
    assert batch.num_label_tokens == len(batch.targets) == int((batch.labels != -100).sum())
    assert batch.visual_indices.tolist() == batch.visual_mask.flatten().nonzero().flatten().tolist()
    assert batch.num_visual == (7, 7) and batch.num_tokens == sum(batch.lengths) == int(batch.attention_mask.sum())


def test_a_part_of_the_prompts_is_that_of_its_rows() -> None:
    grids: list[GridTHW] = [(2, 1, 3), (1, 2, 2), (2, 2, 2)]
    batch = Collator(CharPrompt(), layout, 20, "generate")(
        [sized(name, grid, True) for name, grid in zip("abc", grids, strict=True)]
    )
    part = batch.select([2, 0])
    assert [clip.id for clip in part.clips] == ["c", "a"]
    for name in ("input_ids", "attention_mask", "visual_mask", "features"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[2, 0]]), name
    assert (part.num_visual, part.lengths) == ((8, 6), (batch.lengths[2], batch.lengths[0]))


def test_validation_has_prompts_and_the_labels_of_the_same_clips() -> None:
    collator = Collator(CharPrompt(), 7, 20)
    items = [
        make_sample("a", "배"),
        Skipped(Clip("bad", "bad.mp4", ()), "broken"),
        make_sample("b", ""),
        make_sample("c", "강"),
    ]
    batch = ValidationCollator(dataclasses.replace(collator, mode="generate"), collator, 2)(items)
    assert [clip.id for clip in batch.prompts.clips] == ["a", "b", "c"]
    assert batch.prompts.frames is not None
    assert [[clip.id for clip in part.clips] for part in batch.labelled] == [["a"], ["c"]]
    assert all(part.frames is None for part in batch.labelled)
    assert sorted(skipped.clip.id for skipped in batch.skipped) == ["b", "bad"]
