"""Killed writers and many writers: every clip that is there is whole, and is encoded once."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch

from vlmcap.data.features.filling import FillSettings, fill_store
from vlmcap.data.features.shards import write_shard
from vlmcap.data.features.store import FeatureStore

Make = Callable[..., Any]
FORK = multiprocessing.get_context("fork")
SETTINGS = FillSettings(shard_bytes=100_000, flush_s=0.03, chunk_clips=5, poll_s=0.02)


def fill(root: Path, recipe: Any, clips: Any, start: Any = None, on_wait: Any = None) -> None:
    torch.set_num_threads(1)
    if start is not None:
        start.wait(30)
    fill_store(
        FeatureStore(root, recipe), clips.hashes, clips.batches, clips.encode, on_wait=on_wait, settings=SETTINGS
    )


def fill_alone(root: Path, recipe: Any, clips: Any) -> None:
    """A process alone waits for nobody: the claims of the dead are free."""
    fill(root, recipe, clips, on_wait=pytest.fail)


def require_exact(store: FeatureStore, clips: Any) -> set[int]:
    """Numbers of the clips that are there; each must be bit for bit what it was encoded to."""
    there = set(range(clips.num_clips)) - set(store.missing(clips.hashes).tolist()) - set(clips.broken)
    for number in there:
        assert torch.equal(store.read(clips.hashes[number])[0], clips.features(number).half()), number
    return there


MOMENTS = {
    "encoding": ("vlmcap.data.features.filling.ShardWriter.add", 1),
    "holding a claim that does not say whose it is": ("vlmcap.locks.Path.write_text", 2),
    "a shard half written": ("vlmcap.data.features.shards.os.fsync", 1),
    "a shard without its name": ("vlmcap.files.os.replace", 0),
    "a shard that nobody has looked at": ("vlmcap.data.features.shards.sync_folder", 0),
    "claims of work that is done": ("vlmcap.data.features.filling.Claims.release", 1),
}
"""What a process has when it is killed: the call before which that happens, and how often it is let pass at least."""


def fill_until_killed(root: Path, recipe: Any, clips: Any, moment: str, num_calls: int) -> None:
    where, num_passed = MOMENTS[moment]
    module, _, name = where.rpartition(".")
    call, calls = getattr(resolve_name(module), name), 0

    def kill(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > num_calls + num_passed:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)

    setattr(resolve_name(module), name, kill)
    fill_alone(root, recipe, clips)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_writer_leaves_whole_clips_and_the_next_goes_on(
    tmp_path: Path, numbered: Make, make_recipe: Make, moment: str
) -> None:
    clips = numbered(60, width=2048, broken=(11, 40), batch_size=2)
    root, recipe = tmp_path / "features", make_recipe()
    there: set[int] = set()
    for num_calls in range(4):
        before = len(clips.encoded())
        child = FORK.Process(target=fill_until_killed, args=(root, recipe, clips, moment, num_calls))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        again = set(clips.encoded()[before:]) & there
        assert not again, f"encoded although they were there: {again}"
        store = FeatureStore(root, recipe)
        there |= require_exact(store, clips)
        assert not store.broken
    fill_alone(root, recipe, clips)
    store = FeatureStore(root, recipe)
    assert require_exact(store, clips) == set(range(60)) - {11, 40}
    assert store.skipped(clips.hashes[40]) == "40.mp4 is broken"
    assert not list(store.folder.glob(".*.partial")) and not (store.folder / ".claims").exists()


@pytest.mark.slow
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


def test_a_process_waits_for_what_another_holds_and_takes_over_when_that_dies(
    tmp_path: Path, numbered: Make, make_recipe: Make
) -> None:
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
    fill_store(store, clips.hashes, clips.batches, clips.encode, on_wait=on_wait, settings=SETTINGS)
    assert len(said) == 1 and said[0].startswith(f"waiting for 5 clips that process {child.pid} on ")
    assert require_exact(store, clips) == set(range(20))


def test_clips_of_a_process_that_hangs_are_encoded_here_too(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    root, recipe = tmp_path / "features", make_recipe()
    child = FORK.Process(target=fill, args=(root, recipe, numbered(20, pause_s=600)))  # it lives, and renews its claim
    child.start()
    while not list(root.glob("*/.claims/*")):
        time.sleep(0.005)
    clips, store = numbered(20), FeatureStore(root, recipe)
    settings = dataclasses.replace(SETTINGS, patience_s=0.5)
    try:
        fill_store(store, clips.hashes, clips.batches, clips.encode, on_wait=lambda _: None, settings=settings)
        assert child.is_alive() and require_exact(store, clips) == set(range(20))
    finally:
        child.kill()
        child.join()


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
    elsewhere = store.folder / ".0000-00000000-1-abc.safetensors.0123456789ab-00000000.partial"
    elsewhere.mkdir()
    store.refresh()
    assert len(store) == 0
    fill_store(store, clips.hashes, clips.batches, clips.encode)
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
