"""The index is what the shards say, whatever happens to either; a shard that is not whole is never read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmcap.data.features import index as indices
from vlmcap.data.features.filling import FillSettings, fill_store
from vlmcap.data.features.index import FILE, ShardFile, ShardIndex, contains
from vlmcap.data.features.precision import ErrorSums
from vlmcap.data.features.shards import Entry, Shard
from vlmcap.data.features.store import FeatureStore

Make = Callable[..., Any]
SMALL = FillSettings(chunk_clips=6, shard_bytes=300)


@pytest.fixture
def filled(tmp_path: Path, numbered: Make, make_recipe: Make) -> tuple[Any, FeatureStore]:
    clips = numbered(20, broken=(4,))
    store = FeatureStore(tmp_path / "features", make_recipe())
    fill_store(store, clips.hashes, clips.batches, clips.encode, settings=SMALL)
    assert len(shards_of(store)) > 3
    return clips, FeatureStore(tmp_path / "features", make_recipe())


def shards_of(store: FeatureStore) -> list[Path]:
    return sorted(path for path in store.folder.glob("[!.]*.safetensors") if path.name != FILE)


def require_all(store: FeatureStore, clips: Any) -> None:
    assert not len(store.missing(clips.hashes))
    for number in set(range(clips.num_clips)) - set(clips.broken):
        assert torch.equal(store.read(clips.hashes[number])[0], clips.features(number).half())
    assert store.skipped(clips.hashes[4]) == "4.mp4 is broken"


def test_no_header_is_read_where_the_index_knows(
    filled: tuple[Any, FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, store = filled

    def refuse(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(indices, "read_shard", refuse)
    require_all(store, clips)


@pytest.mark.parametrize("damage", ["none", "empty", "garbage", "cut", "other format", "unknown shard"])
def test_a_lost_index_is_made_again(filled: tuple[Any, FeatureStore], damage: str) -> None:
    clips, store = filled
    path = store.folder / FILE
    whole = path.read_bytes()
    if damage == "none":
        path.unlink()
    elif damage == "unknown shard":
        index = indices.load(store.folder)
        indices.save(dataclasses.replace(index, files=index.files[:1]), store.folder)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "garbage": os.urandom(500),
                "cut": whole[:-5],
                "other format": whole.replace(b"index-2", b"index-9"),
                "other numbers": whole[:-28] + np.full(7, 9999, np.int32).tobytes(),
            }[damage]
        )
    require_all(store, clips)
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    assert path.stat().st_size == len(whole)
    assert len(clips.encoded()) == 19


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "8 bytes",
        "cut header",
        "cut data",
        "longer",
        "garbage",
        "huge header",
        "not a dict",
        "overlap",
        "metadata",
    ],
)
@pytest.mark.parametrize("has_index", [True, False])
def test_a_damaged_shard_is_ignored_and_its_clips_are_encoded_again(
    filled: tuple[Any, FeatureStore], damage: str, has_index: bool
) -> None:
    clips, store = filled
    path = shards_of(store)[1]
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    overlap, plain = json.loads(json.dumps(header)), {**header, "__metadata__": {"format": "vlmcap-features-1"}}
    next(entry for name, entry in overlap.items() if name != "__metadata__")["data_offsets"][0] += 2

    def with_header(changed: Any) -> bytes:
        raw = json.dumps(changed).encode()
        return len(raw).to_bytes(8, "little") + raw + whole[8 + length :]

    damaged = {
        "empty": b"",
        "8 bytes": whole[:8],
        "cut header": whole[:40],
        "cut data": whole[:-1],
        "longer": whole + b"x",
        "garbage": os.urandom(len(whole)),
        "huge header": (2**63).to_bytes(8, "little") + whole[8:],
        "not a dict": with_header([1, 2]),
        "overlap": with_header(overlap),
        "metadata": with_header(plain),
    }[damage]
    path.write_bytes(damaged)
    os.utime(path, ns=(1, 1))
    if not has_index:
        (store.folder / FILE).unlink()
    lost = store.missing(clips.hashes)
    assert 0 < len(lost) < 10
    assert list(store.broken) == [path.name]
    before = len(clips.encoded())
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    assert set(clips.encoded()[before:]) == set(lost.tolist()) - {4}
    require_all(store, clips)


def test_shards_of_another_dtype_or_with_odd_names_are_ignored(
    filled: tuple[Any, FeatureStore], make_recipe: Make
) -> None:
    clips, store = filled
    other = FeatureStore(store.root, make_recipe(dtype="float32"))
    fill_store(other, clips.hashes, clips.batches, clips.encode)
    (shards_of(other)[0]).rename(store.folder / "1-x.safetensors")
    path = shards_of(store)[-1]
    named = path.read_bytes()
    content = next(
        name for name in json.loads(named[8 : 8 + int.from_bytes(named[:8], "little")]) if name != "__metadata__"
    )
    path.with_name("2-x.safetensors").write_bytes(named.replace(content.encode(), b"../" + content.encode()[3:]))
    store.refresh()
    assert store.broken == {
        "1-x.safetensors": "it contains float32 instead of float16",
        "2-x.safetensors": "its metadata is damaged",
    }
    require_all(store, clips)


def test_a_folder_that_cannot_be_written_is_read(
    filled: tuple[Any, FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, store = filled
    (store.folder / FILE).unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    for name in ("touch", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr("vlmcap.data.features.index.replacing", refuse)
    require_all(store, clips)
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    assert len(clips.encoded()) == 19


def contents(numbers: np.ndarray) -> np.ndarray:
    return np.array(
        [f"{(int(number) * 0x9E3779B97F4A7C15F39CC0605CEDC835) % 2**128:032x}" for number in numbers], "S32"
    )


def test_many_clips_are_found_in_a_mapped_index(tmp_path: Path) -> None:
    """What an index of 200 000 clips says, and that opening it reads none of it into memory."""
    num_clips, per_shard = 200_000, 50_000
    hashes = contents(np.arange(num_clips))
    index = ShardIndex()
    for number, start in enumerate(range(0, num_clips, per_shard)):
        entries = [
            Entry(content.decode(), 8 * i, 4 * i, (2, i % 9 + 1, 8), None, i)
            for i, content in enumerate(hashes[start : start + per_shard])
        ]
        file = ShardFile(f"{number}.safetensors", 1, 1, "int8", {}, (), ErrorSums())
        index = index.with_shards([(file, Shard("int8", tuple(entries), {}, (), ErrorSums()))])
    indices.save(index, tmp_path)
    mapped = indices.load(tmp_path)
    assert all(
        isinstance(array, np.memmap) or isinstance(array.base, np.memmap)
        for array in (mapped.hashes, mapped.offsets, mapped.layouts)
    )
    assert (tmp_path / FILE).stat().st_size < num_clips * 80 + 10_000
    for opened in (index, mapped, mapped.without({"0.safetensors"})):
        start = num_clips - len(opened.hashes)
        assert bool((opened.hashes[:-1] < opened.hashes[1:]).all())
        assert contains(opened.hashes, hashes).tolist() == [position >= start for position in range(num_clips)]
        assert not contains(opened.hashes, contents(np.arange(num_clips, num_clips + 1000))).any()
        for position in range(start, num_clips, 9973):
            row = opened.find(bytes(hashes[position]))
            i = position % per_shard
            assert row is not None
            assert opened.offsets[row].tolist() == [8 * i, 4 * i]
            name = opened.files[opened.layouts[row, 0]].name
            assert (name, opened.layouts[row, 1:].tolist()) == (
                f"{position // per_shard}.safetensors",
                [2, i % 9 + 1, 8, 0, 0, 0],
            )
    assert mapped.without({"0.safetensors"}).find(bytes(hashes[0])) is None


def test_a_clip_in_two_shards_is_read_from_one(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(6)
    one, two = (FeatureStore(tmp_path / name, make_recipe()) for name in ("one", "two"))
    for store in (one, two):
        fill_store(store, clips.hashes, clips.batches, clips.encode)
    shard = shards_of(two)[0]
    shard.rename(one.folder / shard.name)
    one.refresh()
    assert len(one) == 6 and len(shards_of(one)) == 2
    for path in shards_of(one)[:1]:
        path.unlink()
    one = FeatureStore(tmp_path / "one", make_recipe())
    (one.folder / FILE).unlink()
    assert all(torch.equal(one.read(clips.hashes[i])[0], clips.features(i).half()) for i in range(6))
