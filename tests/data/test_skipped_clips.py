"""Unusable clips are written down once each, by any number of processes and in bounded space.

Too many of them stop the run.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from vlmcap.data import skipped_clips
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped


def bad(name: str, reason: str = "파일이 비어 있다") -> Skipped:
    return Skipped(Clip(name, f"{name}.mp4", ("글",)), f"{name} {reason}")


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if '"torn' not in line]


def test_a_clip_is_written_once_also_over_runs(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped_clips.jsonl"
    skipped_log = SkippedClipLog(path, 0.5, 10)
    assert not path.exists()
    for name in ("가", "나", "가"):
        skipped_log.add(bad(name))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "torn')  # by a kill
    resumed = SkippedClipLog(path, 0.0, 10)
    resumed.check()  # what an earlier run saw may have been repaired
    resumed.add(bad("나"))
    resumed.add(bad("다"))
    assert entries(path) == [
        {"id": name, "video": f"{name}.mp4", "reason": f"{name} 파일이 비어 있다"} for name in ("가", "나", "다")
    ]
    assert len(resumed) == 2


def test_entries_from_before_training_count(tmp_path: Path) -> None:
    skipped_log = SkippedClipLog(tmp_path / "skipped_clips.jsonl", 0.2, 10)
    skipped_log.add_all([])
    assert not skipped_log.path.exists()
    skipped_log.add_all([bad("가"), bad("나"), bad("가")])
    skipped_log.check()
    assert len(entries(skipped_log.path)) == len(skipped_log) == 2
    skipped_log.add(bad("다"))
    with pytest.raises(
        UserError,
        match=r"3 of 10 clips .* data\.max_bad_fraction=0\.2 .* 가 \(가 파일이 비어 있다\); .*skipped_clips\.jsonl",
    ):
        skipped_log.check()


def test_equal_ids_of_two_splits_are_two_clips(tmp_path: Path) -> None:
    skipped_log = SkippedClipLog(tmp_path / "skipped_clips.jsonl", 0.5, 10)
    for split in ("train", "val"):
        skipped_log.add(Skipped(Clip("a", f"{split}/a.mp4", ()), "it is empty"))
    assert len(skipped_log) == len(entries(skipped_log.path)) == 2


def test_memory_and_file_are_bounded(tmp_path: Path) -> None:
    skipped_log = SkippedClipLog(tmp_path / "skipped_clips.jsonl", 0.5, 1000, max_lines=20)
    skipped_log.add_all(bad(str(i), "x" * 100_000) for i in range(15))
    for i in range(400):
        skipped_log.add(bad(str(i), "x" * 100_000))
    assert len(skipped_log) == 400
    assert len(entries(skipped_log.path)) == 20
    assert skipped_log.path.stat().st_size < 20 * 1200
    skipped_log.add_all(bad(str(i)) for i in range(400, 600))
    with pytest.raises(UserError, match="600 of 1000") as caught:
        skipped_log.check()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", ["줄\n바꿈", "\x00\x1f\x7f", "\u2028", "broken\udcff\udc80name", "한" * 5000])
def test_any_name_makes_one_line_and_is_known_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "skipped_clips.jsonl"
    SkippedClipLog(path, 0.5, 10).add(bad(name))
    SkippedClipLog(path, 0.5, 10).add(bad(name))
    lines = path.read_bytes().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["id"] == name


def note(path: Path, rank: int) -> None:
    skipped_log = SkippedClipLog(path, 1.0, 100)
    for i in range(30):
        skipped_log.add(bad(f"{'shared' if i % 2 else rank}-{i}"))


def test_several_ranks_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "skipped_clips.jsonl"
    first = SkippedClipLog(path, 0.5, 100)
    ranks = [multiprocessing.get_context("fork").Process(target=note, args=(path, rank)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    ids = [entry["id"] for entry in entries(path)]
    assert len(ids) == len(set(ids)) == 4 * 15 + 15
    first.check()
    first.add(bad("last"))
    with pytest.raises(UserError, match="76 of 100"):  # those of the other ranks count
        first.check()


def test_a_process_that_keeps_the_lock_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skipped_clips, "_LOCK_TIMEOUT_S", 0.2)
    path = tmp_path / "skipped_clips.jsonl"
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        skipped_log = SkippedClipLog(path, 1.0, 10)
        skipped_log.add(Skipped(Clip("a", "a.mp4", ()), "it is broken"))
    assert len(skipped_log) == 1 and path.read_text().count("\n") == 1
