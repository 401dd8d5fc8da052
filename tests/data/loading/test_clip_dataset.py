"""Clips become samples, or say in one sentence why not, whatever the decoder does.

What is random hangs on (seed, epoch, index) alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tests.data.decoding.matrix import make_video, read_number
from vlmcap.config import AugmentConfig, DataConfig, Sampling
from vlmcap.data.decoding.video import DecodedFrames, read_frames, read_timed_frames
from vlmcap.data.loading import clip_dataset as dataset_module
from vlmcap.data.loading import isolation
from vlmcap.data.loading.clip_dataset import ClipDataset
from vlmcap.data.loading.isolation import is_available
from vlmcap.errors import UserError
from vlmcap.types import Clip, Sample, Skipped

PLAIN = DataConfig(num_frames=4)
isolations = pytest.mark.parametrize("is_isolated", [False, True])


def shrink(frames: Tensor) -> Tensor:
    return frames[:, :, ::4, ::4].contiguous()


def keep(frames: Tensor) -> Tensor:
    return frames


def grid_of(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    return num_frames, height, width


def as_list(items: list[Sample | Skipped]) -> list[Sample | Skipped]:
    return items


def frames_of(item: Sample | Skipped) -> Tensor:
    assert isinstance(item, Sample)
    assert item.frames is not None
    return item.frames


def first_pixels(item: Sample | Skipped) -> bytes:
    return frames_of(item).flatten()[:1000].numpy().tobytes()


@isolations
@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_videos_are_skipped_with_a_reason(small_clips: list[Clip], num_workers: int, is_isolated: bool) -> None:
    clips = [*small_clips, Clip("gone", "folder/gone.mp4", ())]
    dataset = ClipDataset(
        clips, dataclasses.replace(PLAIN, is_isolated=is_isolated), seed=0, frame_transform=shrink, grid_of=grid_of
    )
    assert len(dataset) == 6
    items = [
        item
        for batch in DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=as_list)
        for item in batch
    ]
    assert {item.clip.id: item.reason for item in items if isinstance(item, Skipped)} == {
        "empty": "empty.mp4 cannot be read: the file is empty",
        "text": "text.mp4 cannot be read: it is damaged, truncated or not a video (Invalid data found when processing "
        "input)",
        "gone": "gone.mp4 cannot be read: there is no such file",
    }
    samples = [item for item in items if isinstance(item, Sample)]
    assert [sample.clip for sample in samples] == small_clips[1:4]
    for sample in samples:
        assert sample.features is None
        assert sample.grid_thw == (4, 48, 64)
        assert torch.equal(frames_of(sample), shrink(read_frames(sample.clip, PLAIN)))


@isolations
def test_an_index_is_always_the_same_and_a_draw_is_its_own(small_clips: list[Clip], is_isolated: bool) -> None:
    clips = small_clips[1:4]
    data = DataConfig(
        sampling=Sampling.random, num_frames=4, augment=AugmentConfig(0.3, 0.3, 0.3), is_isolated=is_isolated
    )
    dataset = ClipDataset(clips, data, seed=3, frame_transform=keep)
    again = ClipDataset(clips, data, seed=3, frame_transform=keep)
    for index in range(3):
        assert torch.equal(frames_of(dataset[index]), read_frames(clips[index], DataConfig(num_frames=4)))
    draws = [(epoch, index) for epoch in range(3) for index in range(3)]
    drawn = {draw: frames_of(dataset[draw]) for draw in draws}
    for draw in reversed(draws):  # in another order, by another object
        assert torch.equal(drawn[draw], frames_of(again[draw]))
    assert len({first_pixels(dataset[epoch, 0]) for epoch in range(3)}) == 3
    other = ClipDataset(clips, data, seed=4, frame_transform=keep)
    assert first_pixels(other[0, 0]) != first_pixels(dataset[0, 0])


def test_numbers_of_numpy_are_keys_too(small_clips: list[Clip]) -> None:
    dataset = ClipDataset(small_clips[1:4], PLAIN, seed=0, frame_transform=keep)
    assert torch.equal(frames_of(dataset[np.int64(2)]), frames_of(dataset[np.int32(0), np.int64(2)]))  # type: ignore[index]


@isolations
def test_without_chance_a_draw_is_the_index_bit_by_bit(small_clips: list[Clip], is_isolated: bool) -> None:
    dataset = ClipDataset(
        small_clips, dataclasses.replace(PLAIN, is_isolated=is_isolated), seed=0, frame_transform=keep
    )
    assert torch.equal(frames_of(dataset[5, 1]), frames_of(dataset[1]))


@pytest.mark.parametrize("is_variable", [False, True])
def test_short_clips_are_padded_unless_they_may_vary(small_clips: list[Clip], is_variable: bool) -> None:
    data = DataConfig(num_frames=40, variable_frames=is_variable)
    dataset = ClipDataset(small_clips[1:4], data, seed=0, frame_transform=keep, grid_of=grid_of)
    counts = [len(read_frames(clip, data)) for clip in dataset.clips]
    assert max(counts) < 40
    items = [dataset[index] for index in range(3)]
    assert [len(frames_of(item)) for item in items] == (counts if is_variable else [40] * 3)
    assert [item.grid_thw for item in items if isinstance(item, Sample)] == [
        (len(frames_of(item)), 48, 64) for item in items
    ]


def timed(item: Sample | Skipped) -> list[tuple[int, float]]:
    """The number that each frame of a video of `make_video` bears, and its time."""
    assert isinstance(item, Sample)
    assert item.times_s is not None
    assert item.frames is not None
    return [
        (read_number(frame.permute(1, 2, 0).numpy()), time_s)
        for frame, time_s in zip(item.frames, item.times_s, strict=True)
    ]


@isolations
@pytest.mark.parametrize("key", [0, (3, 0)], ids=["plain", "drawn"])
@pytest.mark.parametrize(("container", "kind"), [("mp4", "constant"), ("mkv", "variable"), ("mkv", "late start")])
@pytest.mark.parametrize("sampling", Sampling)
def test_times_are_those_of_the_frames_whatever_the_sampling(
    sampling: Sampling, container: str, kind: str, key: Any, is_isolated: bool, tmp_path: Path
) -> None:
    video = make_video(tmp_path, "h264", container, kind)
    augment = AugmentConfig(jitter=0.4)
    data = DataConfig(sampling=sampling, num_frames=6, fps=2.0, augment=augment, is_isolated=is_isolated)
    found = timed(ClipDataset([Clip("a", str(video.path), ())], data, seed=0, frame_transform=keep)[key])
    assert len({number for number, _ in found}) > 3
    assert [time_s for _, time_s in found] == pytest.approx([video.times_s[number] for number, _ in found], abs=0.0011)


@pytest.mark.parametrize("is_variable", [False, True])
def test_frames_that_are_repeated_repeat_their_times(small_clips: list[Clip], is_variable: bool) -> None:
    data = DataConfig(num_frames=16, variable_frames=is_variable)
    item = ClipDataset(small_clips[1:2], data, seed=0, frame_transform=keep)[0]  # 8 frames, 8 per second
    assert isinstance(item, Sample)
    assert item.times_s == tuple(index / 8 for index in range(8) for _ in range(1 if is_variable else 2))


def test_images_count_as_taken_at_two_a_second(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for index, path in enumerate(paths):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(path)
    clips = [Clip("list", paths[0], (), frames=tuple(paths)), Clip("one", paths[0], ())]
    dataset = ClipDataset(clips, DataConfig(num_frames=6), seed=0, frame_transform=keep)
    assert [dataset[index].times_s for index in range(2)] == [(0.0, 0.0, 0.5, 0.5, 1.0, 1.0), (0.0,) * 6]  # type: ignore[union-attr]


def decode_badly(how: str) -> Callable[..., DecodedFrames]:
    """A decoder that handles every clip but `good1` well."""

    def read(clip: Clip, *args: Any, **others: Any) -> DecodedFrames:
        if clip.id == "good1":
            if how == "hang":
                ctypes.PyDLL(None).pause()
            if how == "segfault":
                ctypes.string_at(0)
            if how == "eat":
                return DecodedFrames(torch.zeros(10**9, 3, 480, 640, dtype=torch.uint8), None)
            raise IndexError("list index\nout of range")
        return read_timed_frames(clip, *args, **others)

    return read


@pytest.mark.skipif(not is_available(), reason="needs fork")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("hang", "good1.mp4 cannot be read: decoding took longer than data.decode_timeout_s=1 and was stopped"),
        ("segfault", "good1.mp4 cannot be read: the decoder crashed (signal SIGSEGV)"),
        ("eat", "good1.mp4 cannot be read: decoding needs more memory than data.decode_memory_gib=1"),
        ("raise", "good1.mp4 cannot be read: IndexError: list index (test_clip_dataset.py:"),
    ],
    ids=["hang", "segfault", "eat", "raise"],
)
def test_a_decoder_that_fails_costs_one_clip(
    small_clips: list[Clip], monkeypatch: pytest.MonkeyPatch, how: str, reason: str, num_workers: int
) -> None:
    monkeypatch.setattr(dataset_module, "read_timed_frames", decode_badly(how))
    monkeypatch.setattr(isolation, "_GRACE_S", 0.2)
    data = DataConfig(num_frames=4, decode_timeout_s=1.0, decode_memory_gib=1.0)
    dataset = ClipDataset(small_clips[1:4], data, seed=0, frame_transform=keep)
    items = [
        item
        for batch in DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=as_list)
        for item in batch
    ]
    assert [type(item) for item in items] == [Sample, Skipped, Sample]
    assert isinstance(items[1], Skipped)
    assert items[1].reason.startswith(reason)
    assert "\n" not in items[1].reason


@pytest.mark.skipif(not is_available(), reason="needs fork")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_clip_that_hangs_is_tried_once(
    small_clips: list[Clip], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_workers: int
) -> None:
    hang, log = decode_badly("hang"), tmp_path / "tries"

    def read(clip: Clip, *args: Any, **others: Any) -> DecodedFrames:
        with log.open("a") as file:
            file.write(f"{clip.id}\n")
        return hang(clip, *args, **others)

    monkeypatch.setattr(dataset_module, "read_timed_frames", read)
    monkeypatch.setattr(isolation, "_GRACE_S", 0.2)
    dataset = ClipDataset(
        small_clips[1:4], DataConfig(num_frames=4, decode_timeout_s=1.0), seed=0, frame_transform=keep
    )
    for _ in range(3):  # new workers each time
        items = [
            item
            for batch in DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=as_list)
            for item in batch
        ]
        assert [type(item) for item in items] == [Sample, Skipped, Sample]
    assert sorted(log.read_text().split()) == ["good0"] * 3 + ["good1"] + ["good2"] * 3


def test_without_isolation_memory_and_unexpected_errors_cost_one_clip_too(
    small_clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    for how in ("eat", "raise"):
        monkeypatch.setattr(dataset_module, "read_timed_frames", decode_badly(how))
        dataset = ClipDataset(
            small_clips[1:4], dataclasses.replace(PLAIN, is_isolated=False), seed=0, frame_transform=keep
        )
        assert [type(dataset[index]) for index in range(3)] == [Sample, Skipped, Sample]


@isolations
def test_a_mistake_in_the_configuration_is_raised(small_clips: list[Clip], is_isolated: bool) -> None:
    def refuse(num_frames: int, height: int, width: int) -> None:
        raise UserError(f"data.num_frames must be even, not {num_frames}")

    dataset = ClipDataset(
        small_clips, dataclasses.replace(PLAIN, is_isolated=is_isolated), seed=0, frame_transform=keep, grid_of=refuse
    )
    with pytest.raises(UserError, match=r"^data\.num_frames must be even, not 4$"):
        dataset[1]


def test_it_can_be_pickled_for_spawned_workers(small_clips: list[Clip]) -> None:
    dataset = ClipDataset(small_clips, PLAIN, seed=0, frame_transform=shrink)
    expected = frames_of(dataset[1])  # with a child running
    assert torch.equal(frames_of(pickle.loads(pickle.dumps(dataset))[1]), expected)
