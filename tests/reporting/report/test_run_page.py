"""The page of a single run: its contents, facts, captions of other videos, and that its failure never fails a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.report.invented import HOSTILE
from tests.reporting.report.run_folders import write_one_run, write_run
from vlmcap.compose import read_yaml
from vlmcap.metrics import FactLexicon
from vlmcap.reporting.report import run_page as module
from vlmcap.reporting.report.captions import mark_facts
from vlmcap.reporting.report.folders import read_run
from vlmcap.reporting.report.run_page import NUM_CLIPS, leave_page, next_commands, run_page

LEXICON = FactLexicon.from_dict(
    {"colour": {"빨강": ["빨간"], "파랑": ["파란"]}, "way": {"왼쪽": ["왼쪽으로"], "오른쪽": ["오른쪽으로"]}}
)


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


@pytest.fixture(scope="module")
def page(one_run: Path) -> str:
    return run_page(one_run, read_yaml, version="0.1.0")


def test_it_shows_twelve_test_clips_that_play(page: str) -> None:
    data = embedded(page)
    assert data["metric"] == "test/facts/mean", "the monitored metric on the test clips"
    assert [clip["id"] for clip in data["clips"]] == sorted(clip["id"] for clip in data["clips"])
    assert len(data["clips"]) == NUM_CLIPS and all(clip["id"].startswith("test_") for clip in data["clips"])
    shown = [len(clip["thumbnails"]) for clip in data["clips"] if clip["thumbnails"]]
    assert shown == [8] * 3, "all frames of the short ones"
    assert sum("cannot be read" in clip["picture_note"] for clip in data["clips"]) == NUM_CLIPS - 3, (
        "each states why it has none"
    )
    assert len(page.encode()) < 3_000_000


def test_facts_are_right_or_wrong(page: str) -> None:
    for clip in embedded(page)["clips"]:
        caption = clip["captions"][0]
        assert [mark[3] for mark in clip["reference_marks"]] == [True] * 7, "of the reference itself"
        for start, end, fact, is_right in caption["marks"]:
            assert caption["text"][start:end] == caption["text"][start:end].strip() != ""
            assert fact in {"place", "time", "weather", "object", "colour", "direction", "camera"} and isinstance(
                is_right, bool
            )
    marks = mark_facts("파란 연이 왼쪽으로 간다. \U0001f388", "빨간 연이 왼쪽으로 간다.", LEXICON)
    assert marks == [(0, 2, "colour", False), (6, 10, "way", True)]
    assert mark_facts("파란 연과 빨간 연", "빨간 연", LEXICON) == [(0, 2, "colour", False), (6, 8, "colour", False)], (
        "two values state no fact"
    )
    assert mark_facts("파란 연", "연 하나", LEXICON) == [], "a fact that the reference does not state is not marked"
    assert mark_facts("파란 연", "빨간 연", None) == []


def test_another_clips_video_is_the_next_ones_or_the_measured_one(one_run: Path, page: str, tmp_path: Path) -> None:
    clips = embedded(page)["clips"]
    for clip, following in zip(clips, [*clips[1:], clips[0]], strict=True):
        assert (clip["other"]["clip"], clip["other"]["text"]) == (following["id"], following["captions"][0]["text"])
    name = clips[0]["id"]
    row = {"id": name, "swapped_video": "videos/far.mp4", "swapped": {"loss": 1.0, "prediction": "빨간  연"}}
    folder = write_one_run(tmp_path / "run", tmp_path / "videos")
    (folder / "predictions" / "visual_reliance").mkdir()
    (folder / "predictions" / "visual_reliance" / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = {clip["id"]: clip["other"] for clip in embedded(run_page(folder, read_yaml, version="0.1.0"))["clips"]}
    assert (found[name]["clip"], found[name]["text"]) == ("far.mp4", "빨간 연")


def test_captions_are_data(page: str) -> None:
    assert HOSTILE not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "default-src &#x27;none&#x27;" in page
    assert any("onerror=" in clip["captions"][0]["text"] for clip in embedded(page)["clips"])


def test_next_commands(one_run: Path) -> None:
    run = read_run(one_run, read_yaml)
    commands = next_commands(run, ["zip://a.mp4::clips.zip", "my clips/a.mp4"])
    assert commands["caption"] == f"vlmcap caption 'my clips/a.mp4' --checkpoint {one_run}/checkpoints/best.ckpt"
    assert commands["evaluate"].startswith(
        f"python evaluate.py checkpoint={one_run}/checkpoints/best.ckpt data.split=test"
    )
    assert commands["resume"].endswith(f"seed=0 paths.output_dir={one_run} checkpoint=last")
    assert commands["sweep"].startswith("python train.py -m ") and commands["sweep"].endswith(" seed=0,1,2")
    assert commands["sweep"].count("seed=") == 1
    assert commands["compare"] == f"vlmcap report {one_run} multirun --output report"
    installed = next_commands(dataclasses.replace(run, command="vlmcap train encoder=clip checkpoint=last"))
    assert installed["caption"].startswith("vlmcap caption clip.mp4 ") and installed["evaluate"].startswith(
        "vlmcap evaluate checkpoint="
    )
    assert installed["resume"] == f"vlmcap train encoder=clip paths.output_dir={one_run} checkpoint=last"
    assert installed["sweep"] == "vlmcap train -m encoder=clip seed=0,1,2"


def test_the_page_of_an_evaluation_has_no_training_commands(
    one_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = json.loads((one_run / "summary.json").read_text())["scores"]
    test_scores = {key: value for key, value in scores.items() if key.startswith("test/")}
    (tmp_path / "metrics.json").write_text(
        json.dumps({"checkpoint": "first/best.ckpt", "tokenizer": "mecab_ko (1)", **test_scores})
    )
    (tmp_path / "predictions.jsonl").write_bytes((one_run / "predictions" / "test.jsonl").read_bytes())
    (tmp_path / "evaluation.yaml").write_bytes((one_run / "config.yaml").read_bytes())
    leave_page(tmp_path, read_yaml, version="0.1.0")
    assert capsys.readouterr().out.startswith(f"{tmp_path}/index.html: ")
    data = embedded((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert set(data["commands"]) == {"caption", "evaluate"}
    assert "first/best.ckpt" in data["commands"]["caption"] and len(data["clips"]) == NUM_CLIPS


def test_planned_and_actual_costs(one_run: Path, page: str) -> None:
    run = embedded(page)["runs"][0]
    assert (run["planned_gib"], run["planned_fit_s"], run["peak_memory_gib"], run["seconds"]["fit"]) == (
        11.5,
        480.0,
        10.0,
        550.0,
    )


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_text", full)


@pytest.mark.usefixtures("no_room")
def test_a_full_disk_does_not_fail_the_run(one_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_page(one_run, read_yaml, version="0.1.0")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert (
        "index.html was not written (OSError: [Errno 28] No space left on device); the run itself is complete."
        in printed
    )
    assert not (one_run / "index.html").exists()


def test_a_run_without_scores_prints_why_it_has_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, ["encoder=clip"], has_summary=False)
    leave_page(tmp_path, read_yaml, version="0.1.0")
    assert "index.html was not written (UserError: none of the 1 runs has a score yet" in capsys.readouterr().out
    assert not (tmp_path / "index.html").exists()


def test_slow_videos_are_skipped(one_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_S", 0.0)
    data = embedded(run_page(one_run, read_yaml, version="0.1.0"))
    assert [clip["thumbnails"] for clip in data["clips"]] == [[]] * NUM_CLIPS
