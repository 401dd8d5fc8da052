"""`vlmcap caption`: the files that it finds, and an output that survives every way of stopping.

tests/training/test_real_path.py runs it with a model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vlmcap import cli
from vlmcap.cli.caption import find_videos
from vlmcap.errors import UserError
from vlmcap.training.checkpoints import load
from vlmcap.types import Clip, Skipped


class FakeCaptioner:
    """Captions a clip with its name; fails on names with `bad`, and raises `error` at index `stop_at`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.stop_at, self.error = -1, BaseException()

    def caption_files(self, paths: Sequence[str]) -> Iterator[tuple[str, str | Skipped]]:
        for index, path in enumerate(paths):
            if index == self.stop_at:
                raise self.error
            self.asked.append(Path(path).name)
            name = os.fsencode(Path(path).name).decode(errors="replace")
            yield (
                path,
                Skipped(Clip(str(index), path, ()), "it is broken") if "bad" in name else f"{name} 위로 해가 뜬다.",
            )


@pytest.fixture
def captioner(monkeypatch: pytest.MonkeyPatch) -> FakeCaptioner:
    fake = FakeCaptioner()
    monkeypatch.setattr(load, "load_captioner", lambda checkpoint, settings: fake)
    return fake


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in "abcde":
        (folder / f"{name}.mp4").touch()
    return [str(path) for path in sorted(folder.iterdir())]


def rows_of(path: Path) -> list[dict[str, Any]]:
    content = path.read_text(encoding="utf-8")
    assert not content or content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def names_of(path: Path) -> list[str]:
    return [Path(row["video"]).stem for row in rows_of(path)]


def caption(*arguments: str | Path) -> None:
    cli.main(["caption", "--checkpoint", "x.ckpt", *map(str, arguments)])


def ends(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        caption(*arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


# --- which files ------------------------------------------------------------------------------------------------------


def test_files_and_folders(tmp_path: Path) -> None:
    for name in (
        "b.mp4",
        "a.MKV",
        "notes.txt",
        "deep/c.webm",
        "d.ts",
        "e.WMV",
        "f.mpg",
        "g.mpeg",
        "h.m2ts",
        "deep/i.flv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    inputs = find_videos([tmp_path / "notes.txt", tmp_path])
    names = [os.path.relpath(path, tmp_path) for path in inputs.videos]
    assert names == [
        "notes.txt",
        "a.MKV",
        "b.mp4",
        "d.ts",
        "deep/c.webm",
        "deep/i.flv",
        "e.WMV",
        "f.mpg",
        "g.mpeg",
        "h.m2ts",
    ]


def test_what_is_passed_over_is_said(
    tmp_path: Path, captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.mp4", "._a.mp4", ".thumbnails/b.mp4", "__MACOSX/c.mp4", "a.srt", "b.SRT", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    os.mkfifo(tmp_path / "pipe.mp4")
    caption(tmp_path)
    captured = capsys.readouterr()
    assert captioner.asked == ["a.mp4"]
    assert captured.err.splitlines()[:3] == [
        "3 files with other endings were skipped: .srt, no ending",
        "3 hidden files or folders were skipped",
        f"3 entries that cannot be opened were skipped: {tmp_path}/lost.mp4, {tmp_path}/pipe.mp4, {tmp_path}/self",
    ]


def test_a_hidden_file_that_is_named_is_captioned(tmp_path: Path, captioner: FakeCaptioner) -> None:
    (tmp_path / ".hidden.mp4").touch()
    caption(tmp_path / ".hidden.mp4")
    assert captioner.asked == [".hidden.mp4"]


def test_linked_folders_are_followed_once_and_circles_are_not(tmp_path: Path, captioner: FakeCaptioner) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", root / "b", outside):
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.mp4").touch()
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    for name in ("first", "second"):
        (root / name).symlink_to(outside)
    (outside / "back").symlink_to(root)
    inputs = find_videos([root])
    assert [os.path.relpath(path, root) for path in inputs.videos] == ["a/a.mp4", "b/b.mp4", "first/outside.mp4"]
    only_linked = tmp_path / "only"
    only_linked.mkdir()
    (only_linked / "clips").symlink_to(outside)
    inside = [os.path.relpath(path, only_linked) for path in find_videos([only_linked]).videos]
    assert inside == ["clips/back/a/a.mp4", "clips/back/b/b.mp4", "clips/outside.mp4"]
    assert len(find_videos([root / "first"]).videos) == 3, "a link that is named itself, and the way back into root"


def test_archives_count_as_folders(
    tmp_path: Path, captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for name in ("b.mp4", "a.ts", "._a.ts", "notes.txt"):
            archive.writestr(name, "x")
    (tmp_path / "broken.zip").write_text("no archive")
    output = tmp_path / "out.jsonl"
    assert ends(tmp_path, "--output", output) == 2
    assert [row["video"] for row in rows_of(output)] == [
        f"{tmp_path}/broken.zip",
        f"zip://a.ts::{tmp_path}/clips.zip",
        f"zip://b.mp4::{tmp_path}/clips.zip",
    ]
    assert "error" in rows_of(output)[0]
    err = capsys.readouterr().err
    assert "1 file with another ending was skipped: .txt" in err
    assert "1 hidden file or folder was skipped" in err
    assert find_videos([tmp_path / "clips.zip"]).videos == [row["video"] for row in rows_of(output)[1:]]


def test_paths_that_hold_no_video(tmp_path: Path) -> None:
    (tmp_path / "._a.mp4").touch()
    (tmp_path / "a.srt").touch()
    with pytest.raises(UserError, match=r"holds no video .*\.srt; 1 hidden file or folder was skipped"):
        find_videos([tmp_path])
    with pytest.raises(UserError, match=r"missing\.mp4 does not exist"):
        find_videos([tmp_path / "missing.mp4"])


# --- the output -------------------------------------------------------------------------------------------------------


def test_rows_are_there_as_clips_are_done(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    captioner.stop_at, captioner.error = 2, KeyboardInterrupt()
    assert ends(*clips, "--output", output) == 130
    assert names_of(output) == ["a", "b"]
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == (
        f"Stopped by Ctrl-C: 2 captioned, 0 skipped, 0 failed: {output}; "
        "the same command with --resume continues from there"
    )
    with output.open("a", encoding="utf-8") as file:
        file.write('{"video": "c.mp4", "predi')
    captioner.stop_at = -1
    caption(*clips, "--output", output, "--resume")
    assert captioner.asked == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"], "none twice"
    assert names_of(output) == list("abcde")
    assert capsys.readouterr().out == f"3 captioned, 2 skipped, 0 failed: {output}\n"
    before = output.read_bytes()
    caption(*clips, "--output", output, "--resume")
    assert output.read_bytes() == before
    assert capsys.readouterr().out == f"0 captioned, 5 skipped, 0 failed: {output}\n"


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b"", "ab"),
        (b'{"vid', "ab"),
        (b"\0\0\0\0", "ab"),
        (b"\n\n", "ab"),
        (b'{"video": "\xed\x95', "ab"),
        (b'{"video": "lost.mp4"\n{"video": "other.mp4", "prediction": "x"}', ["a", "b", "other"]),
        (b'{"note": 1}\n', "ab"),
    ],
    ids=[
        "whole",
        "torn",
        "zeros",
        "empty lines",
        "inside a letter",
        "torn before a row without an end",
        "something else",
    ],
)
def test_resuming_keeps_whole_rows_only(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, tail: bytes, kept: Sequence[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("".join(json.dumps({"video": clip, "prediction": "."}) + "\n" for clip in clips[:2]))
    with output.open("ab") as file:
        file.write(tail)
    caption(*clips, "--output", output, "--resume")
    assert captioner.asked == ["c.mp4", "d.mp4", "e.mp4"]
    assert [Path(row["video"]).stem for row in rows_of(output) if "video" in row] == [*kept, *"cde"]
    assert ({"note": 1} in rows_of(output)) is (b"note" in tail), "what others wrote stays"


def test_a_first_row_that_is_torn(clips: list[str], captioner: FakeCaptioner, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"video": "a.mp4", "pre')
    caption(*clips, "--output", output, "--resume")
    assert names_of(output) == list("abcde")


def test_paths_are_compared_however_they_are_written(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    caption("clips/a.mp4", "--output", "out.jsonl")
    caption("--output", "out.jsonl", "--resume", tmp_path / "clips")
    assert captioner.asked == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]


def test_a_bad_clip_is_a_row_and_tried_again(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, output = tmp_path / "clips" / "bad.mp4", tmp_path / "out.jsonl"
    bad.touch()
    assert ends(tmp_path / "clips", "--output", output) == 2
    assert names_of(output) == ["a", "b", "bad", "c", "d", "e"]
    assert rows_of(output)[2] == {"video": str(bad), "error": "it is broken"}
    line = f"Error: 1 of 6 files could not be read; the first is {bad} (it is broken); "
    line += f"5 captioned, 0 skipped, 1 failed: {output}"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert ends(tmp_path / "clips", "--output", output, "--resume") == 2
    assert names_of(output) == ["a", "b", "c", "d", "e", "bad"]
    assert "0 captioned, 5 skipped, 1 failed" in capsys.readouterr().err


def test_a_file_given_twice_has_two_rows(clips: list[str], captioner: FakeCaptioner, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    captioner.stop_at, captioner.error = 1, KeyboardInterrupt()
    assert ends(clips[0], clips[0], "--output", output) == 130
    captioner.stop_at = -1
    caption(clips[0], clips[0], "--output", output, "--resume")
    assert names_of(output) == ["a", "a"]


def test_an_unfinished_file_is_not_lost_without_resume(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    caption(*clips[:2], "--output", output)
    before = output.read_bytes()
    assert ends(*clips, "--output", output) == 2
    assert "has 2 rows of an earlier command and lacks 3 of these 5 files: add --resume" in capsys.readouterr().err
    assert output.read_bytes() == before
    caption(*clips[:2], "--output", output)  # a finished one is written again, as ever
    assert captioner.asked == ["a.mp4", "b.mp4"] * 2
    assert names_of(output) == ["a", "b"]


def test_a_file_of_something_else_is_left_alone(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.jsonl"
    for content in ('{"video": "a.mp4", "captions": ["b"]}\n', "a list\nof lines\n", "one line"):
        labels.write_text(content)
        for more in ([], ["--resume"]):
            assert ends(*clips, "--output", labels, *more) == 2
            assert "holds something other than captions" in capsys.readouterr().err
            assert labels.read_text() == content


def test_mistakes_with_the_output(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(*clips, "--resume") == 2
    assert "--resume needs --output" in capsys.readouterr().err
    assert ends(*clips, "--output", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err


def test_names_that_are_no_unicode(
    captioner: FakeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode("바다.mp4".encode("cp949"))
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / name).touch()
    output = tmp_path / "out.jsonl"
    caption(tmp_path / "clips", "--output", output)
    assert [Path(row["video"]).name for row in rows_of(output)] == [name]
    caption(tmp_path / "clips", "--output", output, "--resume")
    caption(tmp_path / "clips")
    assert len(captioner.asked) == 2


def test_memory_that_runs_out_says_what_helps(
    clips: list[str], captioner: FakeCaptioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner.stop_at, captioner.error = 3, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert ends(*clips, "--output", tmp_path / "out.jsonl") == 2
    err = capsys.readouterr().err
    assert "data.eval_batch_size=1; 3 captioned, 0 skipped, 0 failed" in err
    assert names_of(tmp_path / "out.jsonl") == list("abc")


def test_captions_reach_the_screen_one_by_one(
    clips: list[str], captioner: FakeCaptioner, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner.stop_at, captioner.error = 2, KeyboardInterrupt()
    assert ends(*clips) == 130
    captured = capsys.readouterr()
    assert [line.partition("\t")[0] for line in captured.out.splitlines()] == clips[:2]
    assert captured.err.splitlines()[-1] == "Stopped by Ctrl-C: 2 captioned, 0 skipped, 0 failed"


# The command in a process of its own, around a captioner that sleeps between clips.
SCRIPT = """
import resource, sys, time
from types import SimpleNamespace
class Captioner:
    def caption_files(self, paths):
        for index, path in enumerate(paths):
            time.sleep(float(sys.argv[1]))
            yield path, "해가 뜬다. " * 20
sys.modules["vlmcap.training.checkpoints.load"] = SimpleNamespace(load_captioner=lambda *_: Captioner())
if int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
from vlmcap.cli import main
main(["caption", "--checkpoint", "x.ckpt", *sys.argv[3:]])
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_signals_lose_no_row(clips: list[str], tmp_path: Path, number: int, name: str) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", SCRIPT, "0.5", "0", *clips, "--output", str(output)]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # which whoever started the tests in the background may have ignored
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        deadline = time.monotonic() + 60
        while not output.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    num_rows = len(rows_of(output))
    assert 1 <= num_rows < 5
    assert err.splitlines()[-1].startswith(f"Stopped by {name}: {num_rows} captioned, 0 skipped, 0 failed: {output};")


def test_a_full_disk_loses_no_row(clips: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run = [sys.executable, "-c", SCRIPT, "0"]
    done = subprocess.run([*run, "1200", *clips, "--output", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    num_rows = len(rows_of(output))
    assert 1 <= num_rows < 5
    last = done.stderr.splitlines()[-1]
    assert "cannot be written (File too large): free some space" in last
    assert f"{num_rows} captioned, 0 skipped, 0 failed: {output}" in last
    done = subprocess.run(
        [*run, "0", *clips, "--output", str(output), "--resume"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{5 - num_rows} captioned, {num_rows} skipped, 0 failed: {output}\n"
    assert names_of(output) == list("abcde")
