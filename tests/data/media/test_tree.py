"""The one walk over folders: hidden files, links and circles, for data sets and for `vlmcap caption`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlmcap.data.formats.webdataset import MEDIA
from vlmcap.data.media.tree import IMAGE_ENDINGS, VIDEO_ENDINGS, WalkState, is_hidden_path, walk
from vlmcap.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two folders that link to each other and to their root, a folder shared by two names, and broken links."""
    root = tmp_path / "root"
    for folder in ("a", "b", "shared"):
        (root / folder).mkdir(parents=True)
        (root / folder / f"{folder}.mp4").touch()
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    (root / "train").symlink_to(root / "shared")
    (root / "self").symlink_to(root / "self")
    (root / "lost").symlink_to(root / "nowhere")
    return root


def walked(root: Path, state: WalkState | None = None) -> list[str]:
    return [os.path.relpath(path, root) for path in walk(str(root), state=state)]


def test_a_folder_has_every_name_that_leads_to_it_and_circles_end(root: Path) -> None:
    assert walked(root) == [
        "a/a.mp4",
        "a/to_b/b.mp4",
        "b/b.mp4",
        "b/to_a/a.mp4",
        "shared/shared.mp4",
        "train/shared.mp4",
    ]


def test_a_visit_enters_each_folder_once_by_its_own_name(root: Path) -> None:
    state = WalkState()
    assert walked(root, state) == ["a/a.mp4", "b/b.mp4", "shared/shared.mp4"]
    assert [os.path.relpath(path, root) for path in state.unreadable] == ["lost", "self"]


def test_circles_through_the_outside_end(root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "o.mp4").touch()
    (root / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(root)
    for state in (None, WalkState()):
        found = [os.path.relpath(path, root) for path in walk(str(root), "follow", state)]
        assert found.count("other/o.mp4") == 1
        assert not any("root" in path or "/back/" in path for path in found)


def test_a_folder_that_cannot_be_opened_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(folder: str) -> object:
        if folder.endswith("/b"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"root/b cannot be read \(Permission denied\)"):
        walked(root)
    state = WalkState()
    assert walked(root, state) == ["a/a.mp4", "shared/shared.mp4"]
    assert str(root / "b") in state.unreadable


@pytest.mark.parametrize(
    ("name", "is_hidden"),
    [
        ("a.mp4", False),
        ("./a.mp4", False),
        ("../a.mp4", False),
        ("._a.mp4", True),
        (".git/a.mp4", True),
        ("__MACOSX/a.mp4", True),
    ],
)
def test_hidden_members(name: str, is_hidden: bool) -> None:
    assert is_hidden_path(name) is is_hidden


def test_every_format_knows_the_same_endings() -> None:
    assert {f".{ending}" for ending in MEDIA} == {*VIDEO_ENDINGS, *IMAGE_ENDINGS}
    assert MEDIA.index("mp4") < MEDIA.index("webm") < MEDIA.index("jpg"), "the first of them is a sample's clip"
