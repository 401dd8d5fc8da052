"""What is read is what was encoded; nothing is encoded twice; whatever is not whole is not there."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from vlmcap.data.features.content_hash import UNREADABLE
from vlmcap.data.features.feature_dataset import FeatureDataset
from vlmcap.data.features.filling import FillSettings, fill_store
from vlmcap.data.features.index import FILE
from vlmcap.data.features.precision import DTYPES, dequantize, quantize
from vlmcap.data.features.recipe import Recipe
from vlmcap.data.features.store import FeatureStore
from vlmcap.errors import UserError
from vlmcap.types import Clip, FrameTimes, GridTHW, Sample, Skipped

Make = Callable[..., Any]
SMALL = FillSettings(chunk_clips=6, shard_bytes=300, poll_s=0.01)


def stored(features: Tensor, dtype: str) -> Tensor:
    return dequantize(*quantize(features)) if dtype == "int8" else features.to(getattr(torch, dtype))


def refuse(*_: object) -> Any:
    raise AssertionError("called without need")


def shards_of(store: FeatureStore) -> list[Path]:
    return sorted(path for path in store.folder.glob("[!.]*.safetensors") if path.name != FILE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_what_was_encoded(tmp_path: Path, numbered: Make, make_recipe: Make, dtype: str) -> None:
    clips, recipe = numbered(broken=(1, 7)), make_recipe(dtype=dtype)
    store, seen = FeatureStore(tmp_path / "features", recipe), []
    fill_store(
        store,
        clips.hashes,
        clips.batches,
        clips.encode,
        progress=lambda done, total: seen.append((done, total)),
        settings=SMALL,
    )
    assert seen[0] == (0, 20) and seen[-1] == (20, 20) and seen == sorted(seen)
    assert len(shards_of(store)) > 3
    for opened in (store, FeatureStore(tmp_path / "features", recipe), pickle.loads(pickle.dumps(store))):
        assert len(opened) == 18
        assert not len(opened.missing(clips.hashes))
        for number, content in enumerate(clips.hashes):
            if number in clips.broken:
                assert opened.skipped(content) == f"{number}.mp4 is broken"
                assert content not in opened
                with pytest.raises(KeyError):
                    opened.read(content)
                continue
            features, grid = opened.read(content)
            assert grid is None
            assert opened.skipped(content) is None
            assert torch.equal(features, stored(clips.features(number), dtype))
            assert opened.shape(content) == (2, 4, 8)
    assert sorted(clips.encoded()) == [number for number in range(20) if number not in (1, 7)]


def test_shards_are_plain_safetensors(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered()
    store = FeatureStore(tmp_path, make_recipe(dtype="bfloat16"))
    fill_store(store, clips.hashes, clips.batches, clips.encode, settings=SMALL)
    found = {}
    for path in shards_of(store):
        with safe_open(path, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert {name.encode() for name in found} == set(clips.hashes.tolist())
    assert all(torch.equal(tensor, store.read(name.encode())[0]) for name, tensor in found.items())
    assert store.num_bytes == sum(path.stat().st_size for path in shards_of(store))


def test_features_are_in_memory_of_their_own(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered()
    store = FeatureStore(tmp_path, make_recipe())
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    first, _ = store.read(clips.hashes[0])
    first += 1
    assert torch.equal(store.read(clips.hashes[0])[0], clips.features(0).half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_listed", [True, False])
def test_an_encoder_may_use_its_output_again(
    tmp_path: Path, numbered: Make, make_recipe: Make, dtype: str, is_listed: bool
) -> None:
    clips = numbered()
    given = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    output = torch.empty(3, 2, 4, 8, dtype=given)

    def encode(frames: Tensor, grids: object) -> Tensor | list[Tensor]:
        output[: len(frames)] = clips.encode(frames).to(given)
        return list(output[: len(frames)]) if is_listed else output[: len(frames)]

    store = FeatureStore(tmp_path / "features", make_recipe(dtype=dtype))
    fill_store(store, clips.hashes, clips.batches, encode)
    assert all(torch.equal(store.read(clips.hashes[i])[0], stored(clips.features(i), dtype)) for i in range(20))


def test_only_what_is_missing_is_encoded(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(12, broken=(2,))
    store = FeatureStore(tmp_path / "features", make_recipe())
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    fill_store(store, clips.hashes, refuse, refuse)
    more = numbered(20, broken=(2,))
    other = FeatureStore(tmp_path / "features", make_recipe())
    assert other.missing(more.hashes).tolist() == list(range(12, 20))
    fill_store(other, more.hashes, more.batches, more.encode)
    assert sorted(more.encoded()) == [number for number in range(20) if number != 2]
    store.refresh()
    assert torch.equal(store.read(more.hashes[19])[0], more.features(19).half())


def test_clips_of_equal_content_share_features_and_unreadable_ones_are_never_remembered(
    tmp_path: Path, numbered: Make, make_recipe: Make
) -> None:
    clips = numbered(4)
    hashes = clips.hashes[[0, 1, 0, 2, 3]]
    hashes[4] = UNREADABLE
    store = FeatureStore(tmp_path / "features", make_recipe())
    assert store.missing(hashes).tolist() == [0, 1, 3]

    def batches(positions: np.ndarray) -> Any:
        return clips.batches(np.array([0, 1, 0, 2, 3])[positions])

    fill_store(store, hashes, batches, clips.encode)
    assert sorted(clips.encoded()) == [0, 1, 2]
    assert UNREADABLE not in store and store.skipped(UNREADABLE) is None
    dataset = FeatureDataset([clips.item(i).clip for i in (0, 1, 0, 2, 3)], hashes, store)
    items = [dataset[(7, i)] for i in range(5)]
    assert [type(item) for item in items] == [Sample] * 4 + [Skipped]
    assert torch.equal(items[2].features, clips.features(0).half())  # type: ignore[arg-type, union-attr]
    assert items[4].reason == "3.mp4 cannot be opened"  # type: ignore[union-attr]


def test_clips_whose_decoder_was_lost_are_tried_again_and_broken_ones_are_not(
    tmp_path: Path, numbered: Make, make_recipe: Make
) -> None:
    clips = numbered(8, broken=(2, 5), lost=(2,))
    store = FeatureStore(tmp_path / "features", make_recipe())
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    clips.broken = (5,)
    assert store.missing(clips.hashes).tolist() == []
    assert store.missing(clips.hashes, retry_lost=True).tolist() == [2]
    assert FeatureStore(tmp_path / "features", make_recipe()).missing(clips.hashes, retry_lost=True).tolist() == [2]
    fill_store(store, clips.hashes, clips.batches, clips.encode, retry_lost=True, settings=SMALL)
    assert store.skipped(clips.hashes[2]) is None
    assert store.skipped(clips.hashes[5]) == "5.mp4 is broken"
    assert sorted(clips.encoded()) == [0, 1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("is_cut", [False, True])
def test_clips_of_different_sizes_share_a_store_without_padding(
    tmp_path: Path, make_recipe: Make, is_cut: bool
) -> None:
    """Tiles and native aspect ratios: each clip has its own number of frames and patches."""
    sizes: list[GridTHW] = [(2, 2, 3), (4, 2, 2), (2, 1, 5)]
    samples: list[Sample | Skipped] = [
        Sample(
            Clip(str(i), f"{i}.mp4", ()),
            frames=torch.full((size[0], size[1] * size[2], 3), i + 1, dtype=torch.uint8),
            grid_thw=size,
        )
        for i, size in enumerate(sizes)
    ]

    def encode_by_size(frames: Tensor, grids: Sequence[GridTHW] | None) -> Tensor | list[Tensor]:
        assert grids == sizes
        assert frames.shape == (3, 4, 6, 3)  # zeros behind what is smaller
        features = frames.float()
        return [row[:f, : h * w, :2] for row, (f, h, w) in zip(features, sizes, strict=True)] if is_cut else features

    hashes = np.array([f"{i:032d}" for i in range(1, 4)], "S32")
    store = FeatureStore(tmp_path, make_recipe())
    fill_store(store, hashes, lambda positions: [samples], encode_by_size)
    opened = FeatureStore(tmp_path, make_recipe())
    for sample, size, content in zip(samples, sizes, hashes, strict=True):
        features, grid = opened.read(content)
        assert grid == size == opened.grid_thw(content)
        assert torch.equal(features, sample.frames.half()[..., : features.shape[2]])  # type: ignore[union-attr]
        assert features.shape[2] == (2 if is_cut else 3)


def test_times_are_kept_to_the_last_digit(tmp_path: Path, make_recipe: Make) -> None:
    """Clips with more and fewer frames, in successive shards, and one whose times are unknown."""
    times_s: list[FrameTimes | None] = [(1 / 3, 2 / 3), (0.1, 7e4 / 3, 7e4), None, (0.0,)]
    samples: list[Sample | Skipped] = [
        Sample(
            Clip(str(i), f"{i}.mp4", ()),
            frames=torch.zeros(len(times or (0,)), 3, 2, 2, dtype=torch.uint8),
            times_s=times,
        )
        for i, times in enumerate(times_s)
    ]
    hashes = np.array([f"{i:032d}" for i in range(1, 5)], "S32")
    store = FeatureStore(tmp_path, make_recipe(variable_frames=True))
    fill_store(
        store,
        hashes,
        lambda positions: ([samples[position]] for position in positions),
        lambda frames, grids: frames.float().flatten(3).transpose(2, 3),
        settings=FillSettings(shard_bytes=1),
    )
    assert len(shards_of(store)) == 4
    for opened in (store, FeatureStore(tmp_path, store.recipe)):
        assert [opened.times_s(content) for content in hashes] == times_s
        dataset = FeatureDataset([item.clip for item in samples], hashes, opened)
        assert [dataset[i].times_s for i in range(4)] == times_s  # type: ignore[union-attr]
    shards_of(store)[1].unlink()
    store.refresh()
    assert [store.times_s(content) for content in hashes[[0, 2, 3]]] == [times_s[i] for i in (0, 2, 3)]


def test_short_clips_keep_their_own_number_of_frames(tmp_path: Path, make_recipe: Make) -> None:
    lengths = (4, 1, 3)
    samples: list[Sample | Skipped] = [
        Sample(Clip(str(i), f"{i}.mp4", ()), frames=torch.full((length, 3, 2, 2), i, dtype=torch.uint8))
        for i, length in enumerate(lengths)
    ]
    hashes = np.array([f"{i:032d}" for i in range(1, 4)], "S32")

    def fill(recipe: Recipe) -> FeatureStore:
        store = FeatureStore(tmp_path, recipe)
        fill_store(
            store, hashes, lambda positions: [samples], lambda frames, grids: frames.float().flatten(3).transpose(2, 3)
        )
        return store

    store = fill(make_recipe(variable_frames=True))
    assert [store.read(content)[0].shape for content in hashes] == [(length, 4, 3) for length in lengths]
    with pytest.raises(
        UserError, match=r"clip 1 have shape \(1, 4\), but earlier ones \(4, 4\), and cannot share a store"
    ):
        fill(make_recipe())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_what_was_encoded(tmp_path: Path, numbered: Make, make_recipe: Make, num_workers: int) -> None:
    clips = numbered(broken=(3,))
    store = FeatureStore(tmp_path / "features", make_recipe())
    fill_store(store, clips.hashes, clips.batches, clips.encode, settings=SMALL)
    store.read(clips.hashes[0])  # a map that the workers inherit
    dataset = FeatureDataset([clips.item(i).clip for i in range(20)], clips.hashes, store)
    for _ in range(2):
        items = [
            item
            for batch in DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=list)
            for item in batch
        ]
        assert len(items) == 20
        for number, item in enumerate(items):
            if number == 3:
                assert item == Skipped(clips.item(3).clip, "3.mp4 is broken")
            else:
                assert torch.equal(item.features, clips.features(number).half())


def test_a_data_set_wants_all_clips(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(5)
    store = FeatureStore(tmp_path / "features", make_recipe())
    fill_store(store, clips.hashes[:3], clips.batches, clips.encode)
    with pytest.raises(UserError, match="lacks 2 of 5 clips, the first being 클립3; start again"):
        FeatureDataset([clips.item(i).clip for i in range(5)], clips.hashes, store)


def test_gone_shards_are_a_sentence(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered()
    store = FeatureStore(tmp_path / "features", make_recipe())
    fill_store(store, clips.hashes, clips.batches, clips.encode, settings=SMALL)
    for path in shards_of(store):
        path.unlink()
    with pytest.raises(UserError, match=r"were removed from .* start again to encode them again"):
        store.read(clips.hashes[0])


def test_features_written_again_elsewhere_are_found(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered()
    store, other = (
        FeatureStore(tmp_path / "features", make_recipe()),
        FeatureStore(tmp_path / "features", make_recipe()),
    )
    fill_store(store, clips.hashes, clips.batches, clips.encode, settings=SMALL)
    for path in shards_of(store):
        path.unlink()
    fill_store(other, clips.hashes, clips.batches, clips.encode, settings=SMALL)
    assert torch.equal(store.read(clips.hashes[0])[0], clips.features(0).half())
