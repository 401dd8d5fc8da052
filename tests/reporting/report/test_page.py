"""The page as a file: it runs only its own code, contains the whole report, and stays small."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.reporting.report.invented import HOSTILE, make_report, make_run
from vlmcap.data.decoding.video import write_video
from vlmcap.reporting.report.page import (
    FULL,
    MAX_CURVE_POINTS,
    SCRIPTS,
    ClipFrames,
    page_data,
    read_all_frames,
    read_clip_frames,
    report_page,
)

ROOT = Path(__file__).resolve().parents[3]
WEB = ROOT / "vlmcap" / "reporting" / "report" / "web"


@pytest.fixture(scope="module")
def page() -> str:
    return report_page(make_report())


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("videos") / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (12, 240, 640, 3)).astype(np.uint8)
    write_video(file, noise, fps=4)
    return file


def embedded(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, object] = json.loads(found.group(1))
    return data


def test_hostile_text_is_data(page: str) -> None:
    assert HOSTILE not in page
    assert page.count("<script") == page.count("</script>") == 2, "the data's and the page's own"
    assert "<img" not in page.replace("&lt;img", "")
    data = embedded(page)
    assert data["clips"][0]["captions"][0]["text"] == HOSTILE, "but the text is complete"
    assert data["title"] == f"encoders {HOSTILE}"


def test_only_the_pages_own_code_may_run(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = policy.group(1).replace("&#x27;", "'")
    assert "default-src 'none'" in allowed
    assert "unsafe" not in allowed
    for kind, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        content = re.search(pattern, page, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content.group(1).encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in allowed


def test_no_address_is_fetched(page: str) -> None:
    without_namespace = page.replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address
    data = json.dumps(embedded(page))
    assert not re.findall(r"https?://", without_namespace.replace(data, ""))
    assert not re.findall(r"url\(|@import", without_namespace)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_create_no_markup_from_text(name: str) -> None:
    source = (WEB / name).read_text(encoding="utf-8")
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|fetch\(|XMLHttp|srcdoc", source
    )
    assert "</script" not in source


def test_every_word_is_in_both_languages() -> None:
    source = (WEB / "words.js").read_text(encoding="utf-8")
    words = dict(re.findall(r'^  (\w+): (\["(?:[^"\\]|\\.)*", "(?:[^"\\]|\\.)*"\]),$', source, re.MULTILINE))
    assert len(words) == len(re.findall(r"^  \w+:", source, re.MULTILINE)), (
        "each on a line of its own, English and Korean"
    )
    same = {"rank", "pValue", "madeBy", "gib"}
    for key, pair in words.items():
        english, korean = json.loads(pair)
        assert set(re.findall(r"\{\d\}", english)) == set(re.findall(r"\{\d\}", korean)), key
        assert key in same or key == "language" or re.search("[가-힣]", korean), key
    used = {key for name in SCRIPTS for key in re.findall(r'\bsay\("(\w+)"', (WEB / name).read_text(encoding="utf-8"))}
    assert used <= words.keys()


def test_the_page_contains_the_whole_report(page: str) -> None:
    data, report = embedded(page), make_report()
    assert [run["id"] for run in data["runs"]] == [run.id for run in report.runs]
    assert data["groups"][1]["difference"]["p_value"] == 0.4
    assert data["runs"][-1]["reason"] == report.runs[-1].reason
    whole = [data["common_config"] | run["config"] for run in data["runs"]]
    assert whole == [run.config for run in report.runs], "the common part of configurations is stored once"
    assert data["common_config"] == {"data.root": "data/clips", "llm.layers": [1, 2]}


def test_a_run_without_configuration_keeps_none() -> None:
    report = make_report()
    bare = dataclasses.replace(report.runs[-1], config={})
    data = page_data(dataclasses.replace(report, runs=[*report.runs[:-1], bare]), {})
    assert data["runs"][-1]["config"] == {}
    assert data["common_config"], "the others still share theirs"


def test_long_curves_are_thinned_but_for_their_ends() -> None:
    points = [(step, 1 / (step + 1)) for step in range(5000)]
    run = make_run("r00", "g0", {"encoder": "clip", "projector": "mlp"}, 3.0, curve={"train/loss": points})
    data = page_data(dataclasses.replace(make_report(), runs=[run]), {})
    found = data["runs"][0]["curve"]["train/loss"]
    assert len(found) == MAX_CURVE_POINTS
    assert found[0][0] == 0
    assert found[-1][0] == 4999
    assert [step for step, _ in found] == sorted({step for step, _ in found})


def test_twenty_runs_of_forty_long_captions_are_below_five_megabytes() -> None:
    rng = np.random.default_rng(0)
    report = make_report(num_clips=40, encoders=[f"encoder{index}" for index in range(10)], seeds=2)
    texts = [
        "".join(chr(0xAC00 + code) + " " * (code % 3 == 0) for code in rng.integers(0, 11000, 575).tolist())
        for _ in range(100)
    ]
    clips = [
        dataclasses.replace(
            clip,
            captions=[
                dataclasses.replace(caption, text=texts[(7 * i + j) % 100]) for j, caption in enumerate(clip.captions)
            ],
        )
        for i, clip in enumerate(report.clips)
    ]
    steps = [(step, float(value)) for step, value in enumerate(rng.random(2000))]
    keys = {f"part{index}.some_setting": index for index in range(250)}
    runs = [
        dataclasses.replace(run, curve={f"train/{n}": steps for n in range(6)}, config=keys | run.config)
        for run in report.runs
    ]
    pictures = {clip.id: ClipFrames(("A" * 9000,) * 4) for clip in clips}
    page = report_page(dataclasses.replace(report, clips=clips, runs=runs), pictures)
    assert len(page.encode()) < 5_000_000


# --- frames -----------------------------------------------------------------------------------------------------------


def test_frames_of_a_clip_are_small_jpegs(video: Path) -> None:
    found = read_clip_frames(str(video), num_frames=3)
    assert found.reason == ""
    assert len(found.frames) == 3
    for frame in found.frames:
        content = base64.b64decode(frame)
        picture = Image.open(BytesIO(content))
        assert picture.format == "JPEG"
        assert picture.size == (200, 75), "the maximum width, with the aspect ratio kept"
        assert len(content) < 12_000, "even of noise"


def test_a_video_that_cannot_be_read_has_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    assert read_clip_frames(str(tmp_path / "lost.mp4")) == ClipFrames(
        reason="lost.mp4 cannot be read: there is no such file"
    )
    assert "broken.mp4" in read_clip_frames(str(broken)).reason
    assert "no video" in read_clip_frames("").reason
    archive = tmp_path / "clips.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other.mp4", b"x")
    assert read_clip_frames(f"zip://lost.mp4::{archive}").reason


def test_the_number_and_size_of_frames_are_limited(video: Path) -> None:
    clips = make_report(num_clips=4, videos=[str(video)] * 4).clips
    assert [bool(one.frames) for one in read_all_frames(clips, max_clips=2).values()] == [True, True, False, False]
    few = read_all_frames(clips, max_bytes=1)
    assert [one.reason for one in few.values()] == ["", FULL, FULL, FULL]


def test_frames_and_reasons_are_in_the_page() -> None:
    report = make_report(num_clips=3)
    clip = dataclasses.replace(report.clips[2], thumbnails=["own"])
    report = dataclasses.replace(report, clips=[*report.clips[:2], clip])
    data = page_data(
        report,
        {"clip_000": ClipFrames(("AAAA",)), "clip_001": ClipFrames(reason="lost"), "clip_002": ClipFrames(("BBBB",))},
    )
    assert [(clip["thumbnails"], clip["picture_note"]) for clip in data["clips"]] == [
        (["AAAA"], ""),
        ([], "lost"),
        (["own"], ""),
    ]


def test_without_a_browser_its_tests_are_skipped(tmp_path: Path) -> None:
    code = "from tests.reporting.report.browser import find_chromium; print(find_chromium())"
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "None"
