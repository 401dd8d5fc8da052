"""Whatever happens to a file of a store, a clip has the features that were written or none."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vlmcap.data.features import shards
from vlmcap.data.features.feature_dataset import FeatureDataset
from vlmcap.data.features.filling import FillSettings, fill_store
from vlmcap.data.features.index import FILE
from vlmcap.data.features.precision import dequantize, quantize
from vlmcap.data.features.shards import DAMAGED, DamagedEntryError
from vlmcap.data.features.store import FeatureStore
from vlmcap.data.features.verification import verify_stores
from vlmcap.errors import UserError
from vlmcap.types import Clip, Sample, Skipped

Make = Callable[..., Any]
SMALL = FillSettings(chunk_clips=6, shard_bytes=300)


def make_store(tmp_path: Path, clips: Any, recipe: Any) -> FeatureStore:
    store = FeatureStore(tmp_path / "features", recipe)
    fill_store(store, clips.hashes, clips.batches, clips.encode, settings=SMALL, retry_lost=True)
    return FeatureStore(tmp_path / "features", recipe)


def shards_of(store: FeatureStore) -> list[Path]:
    return sorted(path for path in store.folder.glob("[!.]*.safetensors") if path.name != FILE)


def written(clips: Any, number: int, dtype: str) -> torch.Tensor:
    if dtype == "int8":
        return dequantize(*quantize(clips.features(number)))
    return clips.features(number).to(getattr(torch, dtype))


def overwrite(path: Path, content: bytes) -> None:
    """In place and with the old times, as a disk or a careless copy does it."""
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(path: Path, position: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    overwrite(path, bytes(content))


def read_all(store: FeatureStore, clips: Any, dtype: str) -> int:
    """The number of clips that can be read, all of them as they were written."""
    count = 0
    for number, content in enumerate(clips.hashes):
        try:
            found, _ = store.read(bytes(content))
        except (KeyError, DamagedEntryError):
            continue
        assert torch.equal(found, written(clips, number, dtype)), number
        count += 1
    return count


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_flipped_bit_anywhere_gives_no_wrong_features(
    tmp_path: Path, numbered: Make, make_recipe: Make, dtype: str
) -> None:
    clips = numbered(3)
    store = make_store(tmp_path, clips, make_recipe(dtype=dtype))
    path = shards_of(store)[0]
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        flip(path, position, position % 8)
        read_all(FeatureStore(store.root, store.recipe), clips, dtype)
        (store.folder / FILE).unlink(missing_ok=True)  # without what an earlier look has learnt of the header
        read_all(FeatureStore(store.root, store.recipe), clips, dtype)
        overwrite(path, whole)


def test_a_flipped_bit_in_the_index_gives_no_wrong_features(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(6)
    store = make_store(tmp_path, clips, make_recipe())
    path = store.folder / FILE
    whole = path.read_bytes()
    for position in range(0, len(whole), 5):
        flip(path, position, position % 8)
        assert read_all(FeatureStore(store.root, store.recipe), clips, "float16") == 6
        overwrite(path, whole)


def zeros(path: Path, _: Path) -> None:
    content = path.read_bytes()
    overwrite(path, content[: len(content) // 2].ljust(len(content), b"\0"))


def cut(path: Path, _: Path) -> None:
    overwrite(path, path.read_bytes()[:-20])


def cut_before_its_numbers(path: Path, _: Path) -> None:
    overwrite(path, path.read_bytes()[:4])


def lengthen(path: Path, _: Path) -> None:
    overwrite(path, path.read_bytes() + b"\0")


def swap(path: Path, other: Path) -> None:
    one, two = path.read_bytes(), other.read_bytes()
    overwrite(path, two)
    overwrite(other, one)


def copy_another(path: Path, other: Path) -> None:
    overwrite(path, other.read_bytes())


def swap_entries(path: Path, _: Path) -> None:
    """The numbers of two clips, each as it was written."""
    content = path.read_bytes()
    size = 2 * 4 * 8 * 2
    overwrite(path, content[: -2 * size] + content[-size:] + content[-2 * size : -size])


def rename_entries(path: Path, _: Path) -> None:
    """The header says of two clips what belongs to the other."""
    content = path.read_bytes()
    one, two = (entry.content.encode() for entry in shards.read_shard(path).entries[:2])
    overwrite(path, content.replace(one, b"?" * 32, 1).replace(two, one, 1).replace(b"?" * 32, two, 1))


DAMAGES = [
    zeros,
    cut,
    cut_before_its_numbers,
    lengthen,
    swap,
    copy_another,
    swap_entries,
    rename_entries,
    lambda path, _: flip(path, -1),
]


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_give_no_wrong_features_and_are_made_again(
    tmp_path: Path, numbered: Make, make_recipe: Make, damage: Callable[[Path, Path], None], is_open: bool
) -> None:
    clips = numbered(20)
    store = make_store(tmp_path, clips, make_recipe())
    if is_open:
        assert store.read(bytes(clips.hashes[19]))[0] is not None
    damage(*shards_of(store)[:2])
    named = [Clip(str(i), f"{i}.mp4", ("글",)) for i in range(20)]
    with warnings.catch_warnings(), contextlib.suppress(UserError):  # the run ends where a whole shard has gone
        warnings.simplefilter("ignore")
        dataset = FeatureDataset(named, clips.hashes, store)
        for number in (*range(20), *range(20)):
            item = dataset[number]
            if isinstance(item, Skipped):
                assert item.reason == DAMAGED
            else:
                assert item.features is not None and torch.equal(item.features, written(clips, number, "float16"))
    verify_stores(store.root)
    assert read_all(make_store(tmp_path, clips, store.recipe), clips, "float16") == 20


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_writable", [True, False])
@pytest.mark.filterwarnings("ignore:clip .* damaged")
def test_a_damaged_clip_is_left_out_of_the_run_and_encoded_by_the_next(
    tmp_path: Path,
    numbered: Make,
    make_recipe: Make,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    is_writable: bool,
) -> None:
    clips = numbered(20)
    store = make_store(tmp_path, clips, make_recipe())
    path = shards_of(store)[1]
    entry = shards.read_shard(path).entries[0]
    flip(path, entry.offset + 3)
    bad = clips.hashes.tolist().index(entry.content.encode())
    dataset = FeatureDataset([Clip(f"클립{i}", f"{i}.mp4", ("글",)) for i in range(20)], clips.hashes, store)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "read-only")

    with monkeypatch.context() as patch:
        if not is_writable:
            patch.setattr(shards, "write_shard", refuse)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0)
        for _ in range(3):
            items = list(loader)
            assert [i for i, item in enumerate(items) if isinstance(item, Skipped)] == [bad]
            for number, item in enumerate(items):
                if isinstance(item, Sample):
                    assert item.features is not None and torch.equal(item.features, written(clips, number, "float16"))
            assert items[bad] == Skipped(dataset.clips[bad], DAMAGED, items[bad].is_final)  # type: ignore[union-attr]
        del loader
    if not is_writable:
        verify_stores(store.root)
    encoded = len(clips.encoded())
    again = make_store(tmp_path, clips, store.recipe)
    assert read_all(again, clips, "float16") == 20 and clips.encoded()[encoded:] == [bad]


def test_a_repair_does_not_make_other_damage_look_sound(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(6)
    store = make_store(tmp_path, clips, make_recipe())
    path = max(shards_of(store), key=lambda shard: len(shards.read_shard(shard).entries))
    entries = shards.read_shard(path).entries
    for entry in entries[:2]:
        flip(path, entry.offset)
    store.drop_damaged(entries[0].content.encode())
    assert all(store.skipped(entry.content.encode()) == DAMAGED for entry in entries[:2])
    assert read_all(store, clips, "float16") == 4


def test_a_checksum_is_compared_once(
    tmp_path: Path, numbered: Make, make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, seen = numbered(6), []
    store = make_store(tmp_path, clips, make_recipe())
    checksum = shards.entry_checksum
    monkeypatch.setattr(
        "vlmcap.data.features.store.entry_checksum", lambda *given: (seen.append(given[0]), checksum(*given))[1]
    )
    for _ in range(3):
        assert read_all(store, clips, "float16") == 6
    assert sorted(seen) == sorted(content.decode() for content in clips.hashes.tolist())


def test_all_stores_are_verified(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(20)
    stores = [make_store(tmp_path, clips, make_recipe(layer=layer)) for layer in (-1, -2)]
    calls: list[tuple[int, int]] = []
    assert verify_stores(tmp_path / "features", lambda *call: calls.append(call)) == []
    count = sum(len(shards_of(store)) for store in stores)
    assert calls == [(number, count) for number in range(1, count + 1)]
    (first, second, *_), (third, *_) = map(shards_of, stores)
    entries = shards.read_shard(first).entries
    flip(first, entries[-1].offset)
    cut(second, second)
    flip(stores[1].folder / FILE, -1)
    found = verify_stores(tmp_path / "features")
    assert {(damage.path, damage.contents, damage.is_removed) for damage in found} == {
        (first, (entries[-1].content,), True),
        (second, (), True),
        (stores[1].folder / FILE, (), True),
    }
    assert third.exists() and not first.exists() and not second.exists()
    assert verify_stores(tmp_path / "features") == []


def test_what_an_entry_says_is_part_of_its_checksum() -> None:
    part = np.arange(64, dtype=np.uint8)
    sizes, none = (2, 4, 8), None
    given: list[tuple[Any, ...]] = [("a", sizes, none, ()), ("b", sizes, none, ()), ("a", (4, 2, 8), none, ())]
    given += [("a", sizes, (2, 2, 2), ()), ("a", sizes, none, (0.0, 0.5))]
    assert len({shards.entry_checksum(*entry, [part]) for entry in given}) == len(given)
