"""A table gives back the clips that went in, from any process, and holds none of them in memory."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmcap.data.manifest import ClipTable, TableWriter, write_table
from vlmcap.errors import UserError
from vlmcap.types import Clip

TEXT = st.text(st.characters(codec="utf-8"))
CLIPS = st.lists(
    st.builds(
        Clip,
        TEXT,
        TEXT,
        st.lists(TEXT, max_size=3).map(tuple),
        TEXT,
        st.lists(TEXT, max_size=3).map(tuple),
    ),
    unique_by=lambda clip: clip.id,
    max_size=8,
)


def make_clips(count: int, words: int = 1) -> Iterator[Clip]:
    return (Clip(f"clip{i}", f"v/{i}.mp4", ("바다 위로 해가 뜬다. " * words + str(i),)) for i in range(count))


@given(clips=CLIPS, rows=st.slices(8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_clips_come_back_as_they_were(tmp_path: Path, clips: list[Clip], rows: slice) -> None:
    table = write_table(clips, tmp_path)
    assert list(table) == clips
    assert [table[index] for index in range(len(table))] == clips
    assert list(table[rows]) == clips[rows]
    assert list(table[rows][::-1][1:]) == clips[rows][::-1][1:]
    assert list(pickle.loads(pickle.dumps(table[rows]))) == clips[rows]


def test_it_behaves_as_a_sequence(tmp_path: Path) -> None:
    clips = list(make_clips(10))
    table = write_table(clips, tmp_path)
    assert (table[-1], table[np.int64(3)], len(table[2:8:3])) == (clips[-1], clips[3], 2)
    assert (clips[4] in table, table.index(clips[4]), list(reversed(table))) == (True, 4, clips[::-1])
    for index in (10, -11):
        with pytest.raises(IndexError):
            table[index]


def test_a_choice_keeps_its_order_and_may_be_chosen_from(tmp_path: Path) -> None:
    clips = list(make_clips(10))
    chosen = write_table(clips, tmp_path)[1:].select(np.array([7, 0, 3]))
    assert list(chosen) == [clips[8], clips[1], clips[4]]
    assert list(chosen.select(np.array([2, 0]))) == [clips[4], clips[8]]
    assert list(pickle.loads(pickle.dumps(chosen[1:]))) == [clips[1], clips[4]]
    for bad in (9, -1):
        with pytest.raises(IndexError):
            write_table(clips, tmp_path)[1:].select(np.array([bad]))
    assert len(chosen.select(np.array([], np.int64))) == 0


def test_the_name_is_the_content(tmp_path: Path) -> None:
    first, again, other = (write_table(make_clips(count), tmp_path) for count in (3, 3, 4))
    assert first.path == again.path != other.path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for table in (first, other) for name in (table.path.name, f"{table.path.stem}.offsets.npy")
    )


def test_equal_ids_are_refused_with_both_clips(tmp_path: Path) -> None:
    twins = [Clip("x", "v/1.mp4", ("바다.",)), *make_clips(50), Clip("x", "v/2.mp4", ("산.",))]
    with pytest.raises(
        UserError, match=r"two clips of one split have the id 'x', v/1\.mp4 \('바다\.'\) and v/2\.mp4 \('산\.'\)"
    ):
        write_table(twins, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_equal_hashes_of_other_ids_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.hash", lambda _: 7)
    assert len(write_table(make_clips(5), tmp_path)) == 5


def test_text_that_is_no_unicode_changes_nothing(tmp_path: Path) -> None:
    with TableWriter(tmp_path) as writer:
        for clip in make_clips(2):
            writer.add(clip)
        with pytest.raises(UnicodeEncodeError):
            writer.add(Clip("bad", "v.mp4", ("\ud800",)))
        assert list(writer.close()) == list(make_clips(2))


def test_a_broken_write_leaves_nothing_and_old_leftovers_go(tmp_path: Path) -> None:
    old, new = (tmp_path / f".table.0123456789ab-{token * 8}.partial" for token in "01")
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)

    def broken() -> Iterator[Clip]:
        yield from make_clips(3)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_table(broken(), tmp_path)
    assert list(tmp_path.iterdir()) == [new], "another process may still write there"


def read_all(table: ClipTable) -> str:
    return "".join(clip.id for clip in table)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_a_table(tmp_path: Path, method: str) -> None:
    table = write_table(make_clips(500), tmp_path)
    expected = read_all(table)  # the file is open when the workers come to be
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [table] * 4) == [expected] * 4


def write_equal(folder: Path) -> str:
    return write_table(make_clips(2000), folder).path.name


def test_many_processes_may_write_the_same_table(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        (name,) = set(pool.map(write_equal, [tmp_path] * 12))
    assert read_all(ClipTable(tmp_path / name)) == read_all(write_table(make_clips(2000), tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        table = write_table(make_clips(20_000, words=20), tmp_path)
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        assert sum(len(clip.captions) for clip in table) == 20_000
        read = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    assert table.path.stat().st_size > 12_000_000
    assert written < 2_500_000, "some numbers a clip, and no text"
    assert held < 100_000
    assert read < 200_000
