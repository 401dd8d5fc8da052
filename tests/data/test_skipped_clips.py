"""Unusable clips are written down once each, by any number of processes and in bounded space; too many of them stop the run."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from vlmcap.data import skipped_clips as quarantine
from vlmcap.data.skipped_clips import Ledger
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped


def bad(name: str, reason: str = "파일이 비어 있다") -> Skipped:
    return Skipped(Clip(name, f"{name}.mp4", ("글",)), f"{name} {reason}")


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if '"torn' not in line]


def test_a_clip_is_written_once_also_over_runs(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    ledger = Ledger(path, 0.5, 10)
    assert not path.exists()
    for name in ("가", "나", "가"):
        ledger.add(bad(name))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "torn')  # by a kill
    resumed = Ledger(path, 0.0, 10)
    resumed.check()  # what an earlier run saw may have been repaired
    resumed.add(bad("나"))
    resumed.add(bad("다"))
    assert entries(path) == [{"id": name, "video": f"{name}.mp4", "reason": f"{name} 파일이 비어 있다"} for name in ("가", "나", "다")]
    assert len(resumed) == 2


def test_entries_from_before_training_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "quarantine.jsonl", 0.2, 10)
    ledger.add_all([])
    assert not ledger.path.exists()
    ledger.add_all([bad("가"), bad("나"), bad("가")])
    ledger.check()
    assert len(entries(ledger.path)) == len(ledger) == 2
    ledger.add(bad("다"))
    with pytest.raises(UserError, match=r"3 of 10 clips .* data\.max_bad_fraction=0\.2 .* 가 \(가 파일이 비어 있다\); .*quarantine\.jsonl"):
        ledger.check()


def test_equal_ids_of_two_splits_are_two_clips(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "quarantine.jsonl", 0.5, 10)
    for split in ("train", "val"):
        ledger.add(Skipped(Clip("a", f"{split}/a.mp4", ()), "it is empty"))
    assert len(ledger) == len(entries(ledger.path)) == 2


def test_memory_and_file_are_bounded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "quarantine.jsonl", 0.5, 1000, max_lines=20)
    ledger.add_all(bad(str(i), "x" * 100_000) for i in range(15))
    for i in range(400):
        ledger.add(bad(str(i), "x" * 100_000))
    assert len(ledger) == 400
    assert len(entries(ledger.path)) == 20
    assert ledger.path.stat().st_size < 20 * 1200
    ledger.add_all(bad(str(i)) for i in range(400, 600))
    with pytest.raises(UserError, match="600 of 1000") as caught:
        ledger.check()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", ["줄\n바꿈", "\x00\x1f\x7f", "\u2028", "broken\udcff\udc80name", "한" * 5000])
def test_any_name_makes_one_line_and_is_known_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "quarantine.jsonl"
    Ledger(path, 0.5, 10).add(bad(name))
    Ledger(path, 0.5, 10).add(bad(name))
    lines = path.read_bytes().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["id"] == name


def note(path: Path, rank: int) -> None:
    ledger = Ledger(path, 1.0, 100)
    for i in range(30):
        ledger.add(bad(f"{'shared' if i % 2 else rank}-{i}"))


def test_several_ranks_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Ledger(path, 0.5, 100)
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


def test_a_process_that_keeps_the_lock_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_LOCK_TIMEOUT_S", 0.2)
    path = tmp_path / "quarantine.jsonl"
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ledger = Ledger(path, 1.0, 10)
        ledger.add(Skipped(Clip("a", "a.mp4", ()), "it is broken"))
    assert len(ledger) == 1 and path.read_text().count("\n") == 1
