"""`vlmcap data check` finds problems of a data set, and its page needs no network and has no injected markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vlmcap.cli import main
from vlmcap.data.decoding.video import write_video

LIMIT = 40
REPEATED = "바다 위로 해가 천천히 떠오른다."
CAPTIONS = {
    "train": [REPEATED, "<script>alert(1)</script> 산길을 걷는 사람이 보인다.", "비가 내리는 골목."],
    "val": [REPEATED, "눈 덮인 들판."],
}


def picture(seed: int) -> NDArray[np.uint8]:
    blocks = np.random.default_rng(seed).integers(0, 255, (1, 6, 8, 3), dtype=np.uint8)
    return np.repeat(np.repeat(np.repeat(blocks, 8, axis=1), 8, axis=2), 6, axis=0)


@pytest.fixture(scope="module")
def broken_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a training clip in the validation split, a broken video and label, and a repeated caption."""
    root = tmp_path_factory.mktemp("broken")
    for split, captions in CAPTIONS.items():
        for part in ("videos", "labels"):
            (root / split / part).mkdir(parents=True)
        for index, caption in enumerate(captions):
            label = {"annotation": {"description_kr": caption}, "info": {"place": "바다" if index == 0 else "산"}}
            (root / split / "labels" / f"{split}{index}.json").write_text(json.dumps(label), encoding="utf-8")
            write_video(
                root / split / "videos" / f"{split}{index}.mp4",
                picture(100 if index == 0 else len(split) * 10 + index),
                fps=6,
            )
    (root / "train" / "videos" / "train2.mp4").write_bytes(b"no video")
    shutil.copy(root / "train" / "videos" / "train1.mp4", root / "train" / "videos" / "torn.mp4")
    (root / "train" / "labels" / "torn.json").write_text('{"annotation": ', encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def checked(broken_root: Path, llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output of the command, and its page."""
    from contextlib import redirect_stdout
    from io import StringIO

    folder, printed = tmp_path_factory.mktemp("check"), StringIO()
    overrides = [
        "data=aihub",
        f"data.root={broken_root}",
        "llm=qwen3_8b",
        f"llm.checkpoint={llm_folder}",
        f"llm.max_caption_tokens={LIMIT}",
    ]
    overrides += [f"paths.cache_dir={folder / 'cache'}", "data.num_workers=0", "data.category_key=info.place"]
    with redirect_stdout(printed):
        main(["data", "check", *overrides, "--output", str(folder / "page.html")])
    return printed.getvalue(), folder / "page.html"


def test_the_terminal_lists_problems(checked: tuple[str, Path], tokenizer: Any) -> None:
    printed = " ".join(checked[0].split())
    assert "Clips or labels that cannot be used: 2" in printed
    assert "train2" in printed and "torn" in printed
    assert "Groups of similar clips in different splits, which would make scores too good: 1" in printed
    assert "train/train0 = val/val0" in printed
    assert f"2 × {REPEATED}" in printed
    row = re.search(r"train" + r" │ +(\d+)" * 7, checked[0])
    assert row is not None
    characters = [len(caption) for caption in CAPTIONS["train"]]
    tokens = [len(tokenizer(caption, add_special_tokens=False)["input_ids"]) + 1 for caption in CAPTIONS["train"]]
    num_truncated = sum(count > LIMIT for count in tokens)
    assert 0 < num_truncated < 3
    mean_characters, mean_tokens = round(sum(characters) / 3), round(sum(tokens) / 3)
    expected = [3, 3, mean_characters, max(characters), mean_tokens, max(tokens), num_truncated]
    assert [int(cell) for cell in row.groups()] == expected


def test_the_page_shows_pictures_and_escapes_captions(checked: tuple[str, Path]) -> None:
    page = checked[1].read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= 4
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page fetches nothing"
    assert f"llm.max_caption_tokens={LIMIT}" in page
    assert "train/train0 · 바다" in page or "val/val0 · 바다" in page


def test_captions_alone_need_no_video(broken_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data=aihub", f"data.root={broken_root}", f"paths.cache_dir={tmp_path}"]
    main(["data", "check", *overrides, "--captions-only", "--output", str(tmp_path / "p.html")])
    assert "similar" not in capsys.readouterr().out
    assert "data:image/jpeg" not in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["data=aihub", f"data.root={tmp_path / 'none'}"], "data.root"),
        (["--output", str(tmp_path / "none" / "page.html")], "--output"),
        (["--max-clips", "0"], "--max-clips"),
        (["data=aihubb"], "aihubb"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["data", "check", *arguments])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_it_without_an_error(checked: tuple[str, Path], tmp_path: Path) -> None:
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
    ]
    shown = subprocess.run(
        ["chromium", *options, checked[1].as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    assert 'data-language="' in shown.stdout


def test_repeated_captions_are_counted_by_clip(make_clips: Callable[[list[tuple[str, ...]]], object]) -> None:
    from vlmcap.data.inspection import repeated_captions

    splits = {"train": make_clips([("가", "나"), ("나", "나"), ("다",)]), "val": make_clips([("가",)])}
    found = {text: [(row.split, row.id) for row in rows] for text, rows in repeated_captions(splits)}  # type: ignore[arg-type]
    assert found == {"가": [("train", "0"), ("val", "0")], "나": [("train", "0"), ("train", "1")]}


@pytest.fixture
def make_clips() -> Callable[[list[tuple[str, ...]]], object]:
    from vlmcap.types import Clip

    return lambda rows: [Clip(str(index), f"{index}.mp4", captions) for index, captions in enumerate(rows)]
