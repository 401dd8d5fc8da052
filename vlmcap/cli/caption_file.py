"""The output of `vlmcap caption`: JSON lines that grow clip by clip, and outlive whatever ends the command."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from vlmcap.errors import UserError
from vlmcap.files import replacing

_MARK = b'{"video": '  # what a row begins with


class CaptionFile:
    """A file with one JSON object per line and clip, which grows by whole lines as clips are done.

    A row is `{"video": …, "prediction": …}`, or `{"video": …, "error": …}` for a clip that could not be read. Rows that
    are there are kept by `is_resumed`, but for those of errors, as those clips are tried again, and for broken lines.

    Args:
        path: The file; one that has captions for all of `videos` is written again from its start unless `is_resumed`.
        videos: Paths and addresses that the command was asked for.
        is_resumed: Whether to go on with the file.

    Raises:
        UserError: The file cannot be written, holds something else, or is unfinished and `is_resumed` is not set.
    """

    def __init__(self, path: Path, videos: Sequence[str], *, is_resumed: bool) -> None:
        self.path, self._mode = path, "ab" if is_resumed else "wb"
        self._captioned: Counter[str] = Counter()
        _check_place(path)
        content = path.read_bytes() if path.is_file() else b""
        lines = [(line, row) for line in content.split(b"\n") if (row := _parsed(line)) is not None]
        asked, there = Counter(map(_key, videos)), Counter(_key(row["video"]) for _, row in lines if _is_ours(row))
        if not there and (lines or not _MARK.startswith(content.strip(b"\0 \r\n\t")[: len(_MARK)])):
            raise UserError(
                f"--output: {path} holds something else than captions: choose another name, or remove that file"
            )
        if not is_resumed and there and (missing := (asked - there).total()):
            raise UserError(
                f"--output: {path} has {there.total()} rows of an earlier command, and lacks {missing} of these "
                f"{len(videos)} files: "
                "add --resume to go on with it, or remove it"
            )
        if is_resumed:
            kept = [
                (line, row)
                for line, row in lines
                if not (_is_ours(row) and "error" in row and _key(row["video"]) in asked)
            ]
            self._captioned.update(_key(row["video"]) for _, row in kept if _is_ours(row) and "error" not in row)
            self._rewrite(content, b"".join(line + b"\n" for line, _ in kept))

    def left_of(self, videos: Sequence[str]) -> list[str]:
        """The videos that have no caption in the file, in their order; one that is given twice has two rows."""
        captioned = self._captioned.copy()
        left = []
        for video in videos:
            key = _key(video)
            if captioned[key]:
                captioned[key] -= 1
            else:
                left.append(video)
        return left

    def add(self, row: dict[str, str]) -> None:
        """Adds a whole line or nothing.

        Raises:
            UserError: There is no room.
        """
        line = json.dumps(row, ensure_ascii=False) + "\n"
        try:
            content = line.encode("utf-8")
        except UnicodeEncodeError:  # the name of a file that is no UTF-8
            content = (json.dumps(row) + "\n").encode()
        try:
            with open(self.path, self._mode, buffering=0) as file:
                self._mode = "ab"
                _append(file, content)
        except OSError as error:
            raise self._unwritable(error) from error

    def _rewrite(self, before: bytes, after: bytes) -> None:
        if before == after:
            return
        try:
            with replacing(Path(os.path.realpath(self.path))) as partial:
                partial.write_bytes(after)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"--output: {self.path} cannot be written ({error.strerror}): free some space or choose another place"
        )


def _append(file: IO[bytes], content: bytes) -> None:
    start = file.seek(0, os.SEEK_END)
    left = memoryview(content)
    try:
        while left:  # a disk that is nearly full takes a part
            left = left[file.write(left) :]
    except BaseException:
        file.truncate(start)
        raise


def _check_place(path: Path) -> None:
    """`UserError` for a place that cannot be written, before anything slow begins."""
    if not path.parent.is_dir():
        raise UserError(f"--output: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; give the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output: {path} may not be written by this user: choose another place")


def _parsed(line: bytes) -> Any:
    """The content of a line; None for a broken and for an empty one."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_ours(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("video"), str)
        and isinstance(row.get("prediction", row.get("error")), str)
    )


def _key(video: str) -> str:
    """A file by its absolute path, so that it is the same one however the command names it."""
    member, mark, file = video.rpartition("::")
    return f"{member}{mark}{os.path.abspath(file)}"
