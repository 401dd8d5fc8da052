"""Killed writers and many writers: every clip that is there is whole, and is encoded once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmcap.data.features.settings import FillSettings
from vlmcap.data.features.shards import write_shard
from vlmcap.data.features.store import FeatureStore

Make = Callable[..., Any]
FORK = multiprocessing.get_context("fork")
SETTINGS = FillSettings(shard_bytes=100_000, flush_s=0.03, chunk_clips=5, poll_s=0.02)


def fill(root: Path, recipe: Any, clips: Any, start: Any = None) -> None:
    torch.set_num_threads(1)
    if start is not None:
        start.wait(30)
    FeatureStore(root, recipe).fill(clips.hashes, clips.batches, clips.encode, settings=SETTINGS)


def require_exact(store: FeatureStore, clips: Any) -> set[int]:
    """Numbers of the clips that are there; each must be bit for bit what it was encoded to."""
    there = set(range(clips.num_clips)) - set(store.missing(clips.hashes).tolist()) - set(clips.broken)
    for number in there:
        assert torch.equal(store.read(clips.hashes[number])[0], clips.features(number).half()), number
    return there


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_writer_leaves_whole_clips_and_the_next_goes_on(tmp_path: Path, numbered: Make, make_recipe: Make, seed: int) -> None:
    clips = numbered(120, width=4096, broken=(11, 60), batch_size=2, pause_s=0.004)
    root, recipe, generator = tmp_path / "features", make_recipe(), random.Random(seed)
    there: set[int] = set()
    num_killed = num_torn = 0
    for _ in range(40):
        before = len(clips.encoded())
        child = FORK.Process(target=fill, args=(root, recipe, clips))
        child.start()
        while len(clips.encoded()) == before and child.is_alive():
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.12))
        os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        child.join()
        num_killed += child.exitcode == -signal.SIGKILL
        again = set(clips.encoded()[before:]) & there
        assert not again, f"encoded although they were there: {again}"
        num_torn += len(list((root / recipe.key).glob("*.partial")) + list((root / recipe.key).glob(".*.partial")))
        store = FeatureStore(root, recipe)
        there |= require_exact(store, clips)
        assert not store.broken
        if not len(store.missing(clips.hashes)):
            break
    assert num_killed >= 5
    clips.pause_s = 0
    fill(root, recipe, clips)
    store = FeatureStore(root, recipe)
    assert require_exact(store, clips) == set(range(120)) - {11, 60}
    assert store.skipped(clips.hashes[60]) == "60.mp4 is broken"
    assert not list(store.folder.glob(".*.partial")) and not (store.folder / ".claims").exists()


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_work(tmp_path: Path, numbered: Make, make_recipe: Make, num_processes: int) -> None:
    clips = numbered(90, width=512, broken=(11, 60), batch_size=2, pause_s=0.01)
    root, recipe, start = tmp_path / "features", make_recipe(), FORK.Event()
    children = [FORK.Process(target=fill, args=(root, recipe, clips, start)) for _ in range(num_processes)]
    for child in children:
        child.start()
    start.set()
    reader = FeatureStore(root, recipe)
    num_read = 0
    while any(child.is_alive() for child in children):
        reader.refresh()
        num_read += len(require_exact(reader, clips))
    assert [child.exitcode for child in children] == [0] * num_processes
    assert num_read
    reader.refresh()
    assert require_exact(reader, clips) == set(range(90)) - {11, 60}
    assert sorted(clips.encoded()) == sorted(set(range(90)) - {11, 60})
    assert len({path.name.split("-")[2] for path in reader.folder.glob("[0-9]*.safetensors")}) == num_processes


def test_a_process_waits_for_what_another_holds_and_takes_over_when_that_dies(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(20, pause_s=0.05)
    root, recipe, said = tmp_path / "features", make_recipe(), []
    slow = numbered(20, pause_s=60)
    child = FORK.Process(target=fill, args=(root, recipe, slow))
    child.start()
    while not list(root.glob("*/.claims/*")):
        time.sleep(0.005)

    def on_wait(sentence: str) -> None:
        said.append(sentence)
        os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        child.join()

    store = FeatureStore(root, recipe)
    store.fill(clips.hashes, clips.batches, clips.encode, on_wait=on_wait, settings=SETTINGS)
    assert len(said) == 1 and said[0].startswith("waiting for 5 clips that other processes encode into ")
    assert require_exact(store, clips) == set(range(20))


def test_what_a_killed_process_left_half_written_is_removed_and_what_others_write_is_not(
    tmp_path: Path, numbered: Make, make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = numbered(20)
    store = FeatureStore(tmp_path / "features", make_recipe())
    store.make_folder()

    def die() -> None:
        monkeypatch.setattr("vlmcap.data.features.shards.os.fsync", lambda _: os._exit(9))
        write_shard(store.folder, "float16", {clips.hashes[0].decode(): clips.features(0).half()}, {}, {}, _no_errors())

    child = FORK.Process(target=die)
    child.start()
    child.join(30)
    assert child.exitcode == 9
    assert len(list(store.folder.glob(".*.partial"))) == 1
    elsewhere = store.folder / ".0000-00000000-1-abc.safetensors.1.partial"
    elsewhere.touch()
    store.refresh()
    assert len(store) == 0
    store.fill(clips.hashes, clips.batches, clips.encode)
    assert list(store.folder.glob(".*.partial")) == [elsewhere]
    assert sorted(clips.encoded()) == list(range(20))


def _no_errors() -> Any:
    from vlmcap.data.features.precision import ErrorSums

    return ErrorSums()


def test_lists_that_overlap_are_filled_at_once(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    """Two runs whose training sets differ share a store."""
    many, few = numbered(60, pause_s=0.01), numbered(33, pause_s=0.01)
    root, recipe = tmp_path / "features", make_recipe()
    child = FORK.Process(target=fill, args=(root, recipe, few))
    child.start()
    fill(root, recipe, many)
    child.join(60)
    assert child.exitcode == 0
    store = FeatureStore(root, recipe)
    assert require_exact(store, many) == set(range(60))
    assert np.isin(few.hashes, many.hashes).all()
