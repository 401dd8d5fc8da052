"""`vlmcap`: arguments, files, and mistakes that end in one line and exit code 2. Captioning itself: tests/build/test_real_path.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmcap import cli
from vlmcap.errors import UserError


def exits(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def test_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", "notes.txt", "deep/c.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = cli.find_videos([tmp_path / "notes.txt", tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["notes.txt", "a.MKV", "b.mp4", "deep/c.webm"]


def test_paths_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no video"):
        cli.find_videos([tmp_path])
    with pytest.raises(UserError, match=r"missing\.mp4 does not exist"):
        cli.find_videos([tmp_path / "missing.mp4"])


@pytest.mark.parametrize("is_made", [False, True])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], is_made: bool) -> None:
    video = tmp_path / "clip.mp4"
    if is_made:
        video.touch()
    code, err = exits(["caption", str(video), "--checkpoint", str(tmp_path / "missing.ckpt")], capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("Error: ")
    assert ("missing.ckpt" if is_made else "clip.mp4") in err


def test_an_output_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip.mp4").touch()
    code, err = exits(
        ["caption", str(tmp_path / "clip.mp4"), "--checkpoint", "x.ckpt", "--output", str(tmp_path / "no" / "f.jsonl")], capsys
    )
    assert code == 2
    assert "--output" in err


def test_unknown_commands_and_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["captoin"], ["caption", "clip.mp4"]):
        assert exits(arguments, capsys)[0] == 2


def test_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "find_videos", interrupt)
    assert exits(["caption", str(tmp_path), "--checkpoint", "x.ckpt"], capsys) == (130, "Interrupted.\n")
