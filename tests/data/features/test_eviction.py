"""The bound is kept, what is in use stays, and what is left can be used."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.data.features import leases
from vlmcap.data.features.eviction import list_stores, prune, remove_store
from vlmcap.data.features.filling import FillSettings, fill_store
from vlmcap.data.features.store import FeatureStore
from vlmcap.errors import UserError

Make = Callable[..., Any]
SMALL = FillSettings(chunk_clips=5, shard_bytes=5000)
FORK = multiprocessing.get_context("fork")


def fill(root: Path, recipe: Any, clips: Any, max_bytes: int | None = None) -> None:
    fill_store(
        FeatureStore(root, recipe), clips.hashes, clips.batches, clips.encode, max_bytes=max_bytes, settings=SMALL
    )


def fill_elsewhere(root: Path, recipe: Any, clips: Any, age_s: float) -> str:
    """Key of a store that a process filled which has ended."""
    child = FORK.Process(target=fill, args=(root, recipe, clips))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    used = time.time() - age_s
    os.utime(root / recipe.key / "used", (used, used))
    return str(recipe.key)


def total(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.fixture
def stores(tmp_path: Path, numbered: Make, make_recipe: Make) -> tuple[Path, list[str], Any]:
    """Three stores of about 55 kB; the one in the middle was unused for longest."""
    clips, root = numbered(20, width=128), tmp_path / "features"
    keys = [
        fill_elsewhere(root, make_recipe(layer=-layer), clips, age)
        for layer, age in ((1, 200.0), (2, 300.0), (3, 100.0))
    ]
    return root, keys, clips


def test_stores_are_listed(stores: tuple[Path, list[str], Any]) -> None:
    root, keys, _ = stores
    (root / "notes").mkdir()
    (root / "0123456789abcdeg").mkdir()
    infos = list_stores(root)
    assert [info.key for info in infos] == [keys[2], keys[0], keys[1]]
    assert [info.recipe["layer"] for info in infos] == [-3, -1, -2]
    for info in infos:
        assert info.num_clips == 20
        assert info.num_bytes >= 20 * 2 * 4 * 128 * 2
        assert not info.is_in_use
        assert info.deviation is not None and 0 < info.deviation.rms < 1e-3
    assert time.time() - infos[0].last_used == pytest.approx(100, abs=30)
    assert list_stores(root / "nowhere") == []


def test_the_longest_unused_goes_first_and_what_is_left_can_be_used(
    stores: tuple[Path, list[str], Any], make_recipe: Make
) -> None:
    root, keys, clips = stores
    before, bound = total(root), total(root) - 20_000
    assert prune(root, before) == 0
    freed = prune(root, bound)
    assert before - freed == total(root) <= bound
    infos = {info.key: info for info in list_stores(root)}
    assert infos[keys[0]].num_clips == infos[keys[2]].num_clips == 20
    assert 0 < infos[keys[1]].num_clips < 20
    store = FeatureStore(root, make_recipe(layer=-2))
    left = [i for i in range(20) if clips.hashes[i] in store]
    assert all(torch.equal(store.read(clips.hashes[i])[0], clips.features(i).half()) for i in left)
    encoded = len(clips.encoded())
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    assert sorted(clips.encoded()[encoded:]) == sorted(set(range(20)) - set(left))


def test_whole_stores_go_where_shards_do_not_suffice(stores: tuple[Path, list[str], Any]) -> None:
    root, keys, _ = stores
    prune(root, 60_000)
    assert list_stores(root)[0].key == keys[2]
    assert total(root) <= 60_000
    prune(root, 0, keep=[keys[2]])
    assert [info.key for info in list_stores(root)] == [keys[2]]
    prune(root, 0)
    assert not list(root.iterdir())


def read_and_wait(root: Path, recipe: Any, content: bytes, ready: Any, done: Any) -> None:
    FeatureStore(root, recipe).read(content)
    ready.set()
    done.wait(60)


def test_what_a_living_process_reads_stays(stores: tuple[Path, list[str], Any], make_recipe: Make) -> None:
    root, keys, clips = stores
    ready, done = FORK.Event(), FORK.Event()
    child = FORK.Process(target=read_and_wait, args=(root, make_recipe(layer=-2), clips.hashes[0], ready, done))
    child.start()
    assert ready.wait(60)
    prune(root, 0)
    assert [(info.key, info.is_in_use) for info in list_stores(root)] == [(keys[1], True)]
    child.kill()
    child.join()
    prune(root, 0)
    assert list_stores(root) == []


def test_another_machines_lease_lasts_as_long_as_it_is_renewed(stores: tuple[Path, list[str], Any]) -> None:
    root, keys, _ = stores
    lease = root / keys[0] / ".users" / f"{'0' * 8}-1"
    lease.touch()
    assert leases.is_in_use(root / keys[0])
    os.utime(lease, (time.time() - 3600, time.time() - 3600))
    assert not leases.is_in_use(root / keys[0])
    assert not lease.exists()


def test_filling_keeps_the_bound(stores: tuple[Path, list[str], Any], make_recipe: Make) -> None:
    root, keys, clips = stores
    bound, most = 130_000, 0

    def encode(frames: Any, grids: Any) -> Any:
        nonlocal most
        most = max(most, total(root))
        return clips.encode(frames)

    store = FeatureStore(root, make_recipe(layer=-4))
    assert total(root) > bound
    fill_store(store, clips.hashes, clips.batches, encode, max_bytes=bound, settings=SMALL)
    assert not len(store.missing(clips.hashes))
    assert total(root) < bound + 5000  # the index, written at the end
    prune(root, bound)
    assert total(root) <= bound
    assert {info.key for info in list_stores(root)} >= {store.key, keys[2]}


def test_a_store_that_cannot_fit_is_refused_after_one_batch(
    stores: tuple[Path, list[str], Any], make_recipe: Make
) -> None:
    root, keys, clips = stores
    encoded = len(clips.encoded())
    with pytest.raises(
        UserError, match=r"features take 0\.00 GiB, but cache\.max_gib allows 0\.00; raise it, or set cache\.dtype=int8"
    ):
        fill(root, make_recipe(layer=-4), clips, max_bytes=30_000)
    assert len(clips.encoded()) - encoded == clips.batch_size
    assert {info.key for info in list_stores(root)} >= set(keys)  # nothing was evicted for nothing


def test_a_store_that_does_not_fit_beside_those_in_use_is_refused(
    stores: tuple[Path, list[str], Any], make_recipe: Make
) -> None:
    root, keys, clips = stores
    for layer in (-1, -2, -3):
        FeatureStore(root, make_recipe(layer=layer)).read(clips.hashes[0])  # in use by this process
    with pytest.raises(UserError, match="this run and others in progress"):
        fill(root, make_recipe(layer=-4), clips, max_bytes=150_000)
    assert {info.key for info in list_stores(root)} >= set(keys)


def test_a_store_is_removed_by_name(stores: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    root, keys, _ = stores
    outside = tmp_path / "precious"
    outside.mkdir()
    for key in ("../precious", "..", "", "0" * 16, str(outside)):
        with pytest.raises(UserError, match="there is no feature store"):
            remove_store(root, key)
    assert remove_store(root, keys[0]) > 40_000
    assert {info.key for info in list_stores(root)} == set(keys[1:])
    assert outside.exists()


def test_a_link_is_no_store(stores: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    root, _, _ = stores
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "1.safetensors").write_bytes(b"x" * 1000)
    (root / ("0" * 16)).symlink_to(outside)
    prune(root, 0)
    assert (outside / "1.safetensors").exists()
    with pytest.raises(UserError, match="there is no feature store"):
        remove_store(root, "0" * 16)
