"""Unusable clips are written down once each, and too many of them stop the run in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmcap.data.quarantine import Ledger
from vlmcap.errors import UserError
from vlmcap.types import Clip, Skipped


def bad(name: str) -> Skipped:
    return Skipped(Clip(name, Path(f"{name}.mp4"), ("글",)), f"{name} 파일이 비어 있다")


def test_a_clip_is_written_once_also_over_runs(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    ledger = Ledger(path, 0.5, 10)
    assert not path.exists()
    for name in ("가", "나", "가"):
        ledger.add(bad(name))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "torn')
        file.write("\n")
    resumed = Ledger(path, 0.0, 10)
    resumed.check()  # what an earlier run saw may have been repaired
    resumed.add(bad("나"))
    resumed.add(bad("다"))
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "torn" not in line]
    assert [json.loads(line) for line in lines] == [
        {"id": name, "video": f"{name}.mp4", "reason": f"{name} 파일이 비어 있다"} for name in ("가", "나", "다")
    ]
    assert len(resumed) == 2


def test_too_many_bad_clips_stop_the_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "skipped.jsonl", 0.2, 10)
    for name in ("가", "나"):
        ledger.add(bad(name))
    ledger.check()
    ledger.add(bad("다"))
    with pytest.raises(UserError, match=r"3 of 10 clips .* data\.max_bad_fraction=0\.2 .* 가 \(가 파일이 비어 있다\); .*skipped\.jsonl"):
        ledger.check()
