"""Output file of `vlmcap caption`: JSON lines, written clip by clip and complete even if the command is killed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from vlmcap.errors import UserError
from vlmcap.files import replacing

_START = b'{"video": '  # every row begins with it


class CaptionFile:
    """A file with one JSON object per clip and line, to which whole lines are appended.

    A row is `{"video": …, "prediction": …}`, or `{"video": …, "error": …}` for a clip that could not be read. With
    `is_resumed`, existing rows are kept except broken lines and errors, whose clips are tried again.

    Args:
        path: The file. Without `is_resumed`, a file that has captions for all of `videos` is overwritten.
        videos: Paths and addresses given to the command.
        is_resumed: Whether to continue an existing file.

    Raises:
        UserError: The file cannot be written, holds something else, or is unfinished and `is_resumed` is not set.
    """

    def __init__(self, path: Path, videos: Sequence[str], *, is_resumed: bool) -> None:
        self.path, self._mode = path, "ab" if is_resumed else "wb"
        self._captioned: Counter[str] = Counter()
        _check_writable(path)
        content = path.read_bytes() if path.is_file() else b""
        lines = [(line, row) for line in content.split(b"\n") if (row := _parsed(line)) is not None]
        wanted = Counter(map(_key, videos))
        existing = Counter(_key(row["video"]) for _, row in lines if _is_caption_row(row))
        # Refuse to overwrite a file that holds something else, or captions that this command would not write again.
        # The beginning of a first row, which a killed command leaves, is not something else.
        # A crash can leave zero bytes at the end of a file on some file systems.
        if not existing and (lines or not _START.startswith(content.strip(b"\0 \r\n\t")[: len(_START)])):
            raise UserError(
                f"--output: {path} holds something other than captions: choose another name, or remove that file"
            )
        # Counters, because a video that is given twice has two rows.
        if not is_resumed and existing and (missing := (wanted - existing).total()):
            raise UserError(
                f"--output: {path} has {existing.total()} rows of an earlier command and lacks {missing} of these "
                f"{len(videos)} files: add --resume to continue it, or remove it"
            )
        # Drop broken lines, and the errors of files that are given again, which are then tried again.
        if is_resumed:
            kept = [
                (line, row)
                for line, row in lines
                if not (_is_caption_row(row) and "error" in row and _key(row["video"]) in wanted)
            ]
            self._captioned.update(_key(row["video"]) for _, row in kept if _is_caption_row(row) and "error" not in row)
            self._rewrite(content, b"".join(line + b"\n" for line, _ in kept))

    def remaining(self, videos: Sequence[str]) -> list[str]:
        """Returns the videos that have no caption in the file, in order; a video given twice needs two rows."""
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
        """Appends a whole line or nothing.

        Raises:
            UserError: The file cannot be written, for instance because the disk is full.
        """
        line = json.dumps(row, ensure_ascii=False) + "\n"
        try:
            content = line.encode("utf-8")
        except UnicodeEncodeError:  # a file name that is not UTF-8
            content = (json.dumps(row) + "\n").encode()
        try:
            # Unbuffered, so that one `write` is one system call.
            with open(self.path, self._mode, buffering=0) as file:
                # Only the first row may replace an old file.
                self._mode = "ab"
                _append(file, content)
        except OSError as error:
            raise self._unwritable(error) from error

    def _rewrite(self, before: bytes, after: bytes) -> None:
        if before == after:
            return
        try:
            # Behind a symbolic link, the file itself is replaced and not the link.
            with replacing(Path(os.path.realpath(self.path))) as partial:
                partial.write_bytes(after)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"--output: {self.path} cannot be written ({error.strerror}): free some space or choose another folder"
        )


def _append(file: IO[bytes], content: bytes) -> None:
    """Appends all of the content, or restores the length of the file and raises."""
    start = file.seek(0, os.SEEK_END)
    left = memoryview(content)
    try:
        while left:  # a disk that is nearly full may write only some of the bytes
            left = left[file.write(left) :]
    except BaseException:
        # Half a line would damage the next one that is appended.
        file.truncate(start)
        raise


def _check_writable(path: Path) -> None:
    """Raises `UserError` for a path that cannot be written, before anything slow begins."""
    if not path.parent.is_dir():
        raise UserError(f"--output: the folder {path.parent} does not exist; create it or choose another one")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; give the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output: no permission to write {path}: choose another folder")


def _parsed(line: bytes) -> Any:
    """Parses a line; returns None for a broken or an empty one."""
    try:
        return json.loads(line)
    # RecursionError: a line of thousands of nested brackets.
    except (ValueError, RecursionError):
        return None


def _is_caption_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("video"), str)
        and isinstance(row.get("prediction", row.get("error")), str)
    )


def _key(video: str) -> str:
    """Identifies a file by its absolute path, so that relative paths name the same file."""
    # "member.mp4::archive.zip" names a member of an archive; only the archive is a path.
    member, separator, file = video.rpartition("::")
    return f"{member}{separator}{os.path.abspath(file)}"
