"""MSR-VTT: sentences are gathered by video, and the splits are its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmcap.config import MsrvttConfig
from vlmcap.data.decoding.video import decode_frames, write_video
from vlmcap.data.formats import Record, read_records
from vlmcap.errors import UserError
from vlmcap.types import Skipped

NAME = "train_val_videodatainfo.json"


def video(number: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    url = f"https://www.youtube.com/watch?v={number // 2}"
    return {
        "category": number,
        "url": url,
        "video_id": f"video{number}",
        "split": split,
        "id": number,
        "start time": 1.5,
        **changes,
    }


def sentences(*numbers: int) -> list[dict[str, Any]]:
    return [{"caption": f"{n}번 영상의 문장 {i}", "video_id": f"video{n}", "sen_id": i} for i, n in enumerate(numbers)]


def write(root: Path, name: str = NAME, **content: Any) -> None:
    (root / name).write_text(json.dumps({"info": {"year": "2016"}, **content}, ensure_ascii=False), encoding="utf-8")
    (root / "videos").mkdir(exist_ok=True)
    for item in content.get("videos", []):
        if isinstance(item, dict) and "video_id" in item:
            (root / "videos" / f"{item['video_id']}.mp4").write_bytes(b"x")


def read(root: Path, split: str | None = None, **changes: Any) -> list[Record | Skipped]:
    settings = {
        "annotations": "*videodatainfo*.json",
        "media": "videos",
        "caption_key": "caption",
        "category_key": "category",
        **changes,
    }
    return list(read_records(MsrvttConfig(root=str(root), **settings), split))


def test_a_video_has_the_sentences_that_name_it(tmp_path: Path) -> None:
    write(tmp_path, videos=[video(0), video(1, "validate"), video(2)], sentences=sentences(1, 0, 2, 0, 1))
    write(tmp_path, "test_videodatainfo.json", videos=[video(3, "test")], sentences=sentences(3))
    records = {item.clip.id: item for item in read(tmp_path) if isinstance(item, Record)}
    assert {id: record.split for id, record in records.items()} == {
        "video0": "train",
        "video1": "validate",
        "video2": "train",
        "video3": "test",
    }
    assert records["video0"].clip.captions == ("0번 영상의 문장 1", "0번 영상의 문장 3")
    assert [len(record.clip.captions) for record in records.values()] == [
        1,
        2,
        2,
        1,
    ]  # the test file comes first by its name
    assert records["video2"].clip.category == "2"
    assert records["video0"].group == records["video1"].group != records["video2"].group  # two cuts of one film
    assert records["video3"].clip.video == str(tmp_path / "videos" / "video3.mp4")


def test_real_videos_are_found_and_decode(tmp_path: Path, make_frames: Callable[..., Any]) -> None:
    write(tmp_path, videos=[video(0)], sentences=sentences(0))
    frames = make_frames(6)
    write_video(tmp_path / "videos" / "video0.mp4", frames, fps=6)
    (record,) = read(tmp_path)
    decoded = decode_frames(record.clip.video, 2)
    assert decoded.shape == (2, 3, 48, 64)
    assert np.abs(decoded[0].permute(1, 2, 0).numpy().astype(int) - frames[1].astype(int)).mean() < 12


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    lost = {"caption": "주인 없는 문장", "video_id": "video9"}
    blank = {"caption": " \n", "video_id": "video2"}
    write(
        tmp_path,
        videos=[video(0), video(1), {"id": 7}, "x", video(2), video(4)],
        sentences=[*sentences(0, 4), lost, blank],
    )
    (tmp_path / "videos" / "video4.mp4").unlink()
    entries = read(tmp_path)
    assert [item.clip.id for item in entries if isinstance(item, Record)] == ["video0"]
    reasons = {item.clip.id: item.reason for item in entries if isinstance(item, Skipped)}
    assert list(reasons) == ["video1", "video 2", "video 3", "video2", "video4", "video9"]
    assert reasons["video1"] == reasons["video2"] == "no sentence of the video has a caption"
    assert "there is no file" in reasons["video4"]
    assert "not in 'videos'" in reasons["video9"]


def test_a_korean_translation_has_a_key_of_its_own(tmp_path: Path) -> None:
    write(
        tmp_path, videos=[video(0)], sentences=[{"video_id": "video0", "caption": "a boat", "ko": {"text": "배 한 척"}}]
    )
    (record,) = read(tmp_path, caption_key="ko.text")
    assert record.clip.captions == ("배 한 척",)
    with pytest.raises(
        UserError, match=r"data\.caption_key=caption_ko, the first has text at video_id, caption, ko\.text"
    ):
        read(tmp_path, caption_key="caption_ko")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"videos": [video(0)]}, "keys info, videos instead of an object with a list 'sentences'"),
        ({"sentences": sentences(0)}, "a list 'videos'; name"),
        ({"videos": [], "sentences": []}, "has no entries"),
        ({"videos": {}, "sentences": []}, "a list 'videos'; name"),
        ({"videos": [video(0)], "sentences": []}, "no sentence of the video"),
    ],
)
def test_another_layout_is_described(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    write(tmp_path, **content)
    with pytest.raises(UserError, match=reason):
        read(tmp_path)
