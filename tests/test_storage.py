"""Folders that are not writable give one sentence, and a full disk destroys neither checkpoints nor `status.json`."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.errors import storage_problem
from vlmcap.sweeping import job
from vlmcap.sweeping.job import FAILED, INTERRUPTED, Status, read_status
from vlmcap.training.callbacks.saving import AtomicCheckpointIO


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "/a cannot be used, because the disk is full"),
        (errno.EROFS, "/a/b cannot be used, because the file system is read-only"),
        (errno.EACCES, "/a/b cannot be used, because permission is denied"),
        (errno.ENOTDIR, "a component of the path is a file"),
    ],
)
def test_the_sentence_names_the_folder(number: int, expected: str) -> None:
    found = storage_problem(OSError(number, os.strerror(number), "/a/b"))
    assert found is not None
    assert expected in found
    outer = RuntimeError("a worker failed")
    outer.__cause__ = OSError(number, os.strerror(number), "/a/b")
    assert storage_problem(outer) == found


def test_libraries_say_it_in_words_and_other_errors_are_left() -> None:
    assert "/run cannot be used, because the disk is full" in str(
        storage_problem(RuntimeError("I/O error: No space left on device (os error 28)"), "/run")
    )
    assert storage_problem(FileNotFoundError(errno.ENOENT, "no", "/a")) is None
    assert storage_problem(RuntimeError("shapes differ")) is None


def test_a_checkpoint_that_has_no_room_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, saved = tmp_path / "last.ckpt", {"step": torch.tensor(1)}
    AtomicCheckpointIO().save_checkpoint(saved, target)

    def full(content: Any, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        AtomicCheckpointIO().save_checkpoint({"step": torch.tensor(2)}, target)
    assert caught.value.filename == str(target)
    assert torch.load(target, weights_only=True) == saved
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_keeps_the_status_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    Status(INTERRUPTED, "x" * 300).write(tmp_path)
    monkeypatch.setattr(job, "replacing", full)
    Status(FAILED, "the disk is full").write(tmp_path)
    found = read_status(tmp_path)
    assert found is not None
    assert (found.status, found.reason) == (FAILED, "the disk is full")
    with pytest.raises(OSError, match="No space left"):
        Status(FAILED).write(tmp_path / "other")
