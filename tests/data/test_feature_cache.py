"""A cache is whole or absent; its name changes with whatever it was computed from."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlmcap.data import feature_cache
from vlmcap.data.feature_cache import FeatureCache, cache_key, clip_fingerprint, clips_fingerprint, size_bytes
from vlmcap.errors import UserError
from vlmcap.types import Clip, GridTHW, Sample, Skipped

Batches = list[list[Sample | Skipped]]


def make_batches(num_clips: int = 5, batch_size: int = 2) -> Batches:
    """Samples of (2, 3, 4, 4) frames; the second clip is skipped."""
    items: list[Sample | Skipped] = []
    for i in range(num_clips):
        clip = Clip(f"클립{i}", Path(f"{i}.mp4"), ("글",))
        frames = torch.full((2, 3, 4, 4), i, dtype=torch.uint8)
        items.append(Skipped(clip, "broken") if i == 1 else Sample(clip, frames=frames))
    return [items[i : i + batch_size] for i in range(0, num_clips, batch_size)]


def encode(frames: Tensor, grids: Sequence[GridTHW] | None = None) -> Tensor:
    return frames.float().mean(dim=2).flatten(2, 3)[..., None].expand(-1, -1, -1, 3) / 7  # (B, F, 16, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_are_the_encoded_clips(tmp_path: Path, dtype: str) -> None:
    cache, seen = FeatureCache(tmp_path, "k"), []
    cache.build(make_batches(), encode, 5, dtype, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    for opened in (cache, FeatureCache(tmp_path, "k"), pickle.loads(pickle.dumps(cache))):
        assert opened.shape == (4, 2, 16, 3)
        assert opened.dtype == getattr(torch, dtype)
        assert opened.skipped == {"클립1": "broken"}
        expected = encode(torch.full((1, 2, 3, 4, 4), 3, dtype=torch.uint8))[0].to(opened.dtype)
        assert torch.equal(opened.read("클립3"), expected)
    assert "클립1" in cache
    assert "클립9" not in cache
    assert (tmp_path / "k" / "features.bin").stat().st_size == size_bytes(4, 2, 16, 3, dtype)
    with pytest.raises(KeyError):
        cache.read("클립1")


def test_clips_of_different_sizes_share_a_cache_without_padding(tmp_path: Path) -> None:
    """Tiles and native aspect ratios: each clip has its own number of frames and patches."""
    sizes: list[GridTHW] = [(2, 2, 3), (4, 2, 2), (2, 1, 5)]
    samples = [
        Sample(
            Clip(str(i), Path(f"{i}.mp4"), ()), frames=torch.full((size[0], size[1] * size[2], 3), i + 1, dtype=torch.uint8), grid_thw=size
        )
        for i, size in enumerate(sizes)
    ]
    given: list[Sequence[GridTHW] | None] = []

    def own(frames: Tensor, grids: Sequence[GridTHW] | None) -> Tensor:
        given.append(grids)
        assert frames.shape == (3, 4, 6, 3)  # zeros behind what is smaller
        return frames.float()

    cache = FeatureCache(tmp_path, "k")
    cache.build([list(samples)], own, 3)
    assert given == [sizes]
    assert cache.shape == (3, 4, 6, 3)
    for sample, size in zip(samples, sizes, strict=True):
        assert torch.equal(cache.read(sample.clip.id), sample.frames.half())  # type: ignore[union-attr]
        assert FeatureCache(tmp_path, "k").grid_thw(sample.clip.id) == size
    assert (tmp_path / "k" / "features.bin").stat().st_size == sum(f * h * w for f, h, w in sizes) * 3 * 2


def test_a_complete_cache_is_not_built_again(tmp_path: Path) -> None:
    FeatureCache(tmp_path, "k").build(make_batches(), encode, 5)

    def refuse(frames: Tensor, grids: object) -> Tensor:
        raise AssertionError

    FeatureCache(tmp_path, "k").build(make_batches(), refuse, 5)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[list[Sample | Skipped]]:
        yield make_batches()[0]
        raise RuntimeError("out of memory")

    cache = FeatureCache(tmp_path, "k")
    with pytest.raises(RuntimeError):
        cache.build(failing(), encode, 5)
    assert not cache.is_complete
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def build_and_die(root: Path) -> None:
    def dying() -> Iterator[list[Sample | Skipped]]:
        yield make_batches()[0]
        os._exit(9)  # as a kill does: no cleaning up

    FeatureCache(root, "k").build(dying(), encode, 5)


def test_a_killed_build_is_never_read_and_is_cleaned_up(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=build_and_die, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    assert (tmp_path / ".k.building").is_dir()
    assert not FeatureCache(tmp_path, "k").is_complete
    FeatureCache(tmp_path, "other").build(make_batches(), encode, 5)  # a build of another key cleans up as well
    assert not (tmp_path / ".k.building").exists()
    FeatureCache(tmp_path, "k").build(make_batches(), encode, 5)
    assert FeatureCache(tmp_path, "k").is_complete


def test_a_build_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".k.building").mkdir()
    with feature_cache._lock(tmp_path / ".k.lock", is_blocking=True):
        FeatureCache(tmp_path, "other").build(make_batches(), encode, 5)
    assert (tmp_path / ".k.building").exists()


@pytest.mark.parametrize("damage", ["short", "no index", "torn index", "other format"])
def test_a_damaged_cache_counts_as_none_and_is_replaced(tmp_path: Path, damage: str) -> None:
    FeatureCache(tmp_path, "k").build(make_batches(), encode, 5)
    rows, index = tmp_path / "k" / "features.bin", tmp_path / "k" / "index.json"
    if damage == "short":
        rows.write_bytes(rows.read_bytes()[:-1])
    elif damage == "no index":
        index.unlink()
    elif damage == "torn index":
        index.write_bytes(index.read_bytes()[:20])
    else:
        index.write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")) | {"format": 99}))
    cache = FeatureCache(tmp_path, "k")
    assert not cache.is_complete
    with pytest.raises(UserError, match="no complete feature cache"):
        cache.read("클립0")
    cache.build(make_batches(), encode, 5)
    assert cache.read("클립0").shape == (2, 16, 3)


def test_features_that_cannot_be_stored(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "k")
    with pytest.raises(UserError, match=r"클립2 overflow cache\.dtype=float16: set cache\.dtype=bfloat16"):
        cache.build(make_batches(), lambda frames, grids: encode(frames) * 3e5, 5)
    with pytest.raises(UserError, match="클립0 are not finite"):
        cache.build(make_batches(), lambda frames, grids: encode(frames) / 0, 5, "float32")
    with pytest.raises(UserError, match="cannot share a cache"):
        cache.build(make_batches(batch_size=1), lambda frames, grids: encode(frames)[:, :, int(frames.max()) :], 5)
    with pytest.raises(UserError, match=r"none of 2 clips can be cached: broken"):
        cache.build(
            [[item for item in make_batches()[0] if isinstance(item, Skipped)], [Skipped(Clip("b", Path("b"), ()), "x")]], encode, 2
        )
    with pytest.raises(UserError, match=r"cache\.dtype must be one of"):
        cache.build(make_batches(), encode, 5, "int8")
    with pytest.raises(UserError, match="GB are free"):
        cache.build(make_batches(), encode, 10**15)
    assert not cache.is_complete


def test_the_key_is_canonical() -> None:
    key = cache_key(encoder="clip", size=(336, 336), frames=8, options={"b": 1, "a": None})
    assert key == cache_key(options={"a": None, "b": 1}, frames=8, size=[336, 336], encoder="clip")
    assert key != cache_key(encoder="clip", size=(336, 336), frames=8, options={"b": True, "a": None})
    assert len(key) == 16
    for odd in (Path("x"), torch.float16, {1: 2}, {1}):
        with pytest.raises(TypeError, match="cache key"):
            cache_key(part=odd)
    with pytest.raises(ValueError):
        FeatureCache("root", "../k")


@pytest.mark.parametrize("size", [10, 3 * 1024 * 1024])
def test_the_fingerprint_follows_the_content(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(bytes(size))
    first = clip_fingerprint(path)
    os.utime(path, (0, 0))
    assert clip_fingerprint(path) == first
    for changed in (bytes(size + 1), b"x" + bytes(size - 1), bytes(size - 1) + b"x"):
        path.write_bytes(changed)
        assert clip_fingerprint(path) != first
    path.unlink()
    assert clip_fingerprint(path) == "0" * 64


def test_a_data_set_is_its_ids_and_videos(small_clips: list[Clip]) -> None:
    first = clips_fingerprint(small_clips)
    assert clips_fingerprint(small_clips[::-1]) == first
    assert clips_fingerprint([Clip(clip.id, clip.video, ("다른 글",)) for clip in small_clips]) == first
    assert clips_fingerprint(small_clips[1:]) != first
    assert clips_fingerprint([Clip(clip.id, small_clips[0].video, ()) for clip in small_clips]) != first
