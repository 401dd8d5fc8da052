"""A user's own data format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins import own_registries, plugin_file
from tests.test_own_components import PARTS
from vlmcap.assembly.clips import load_splits
from vlmcap.compose import compose
from vlmcap.config import Split
from vlmcap.errors import UserError
from vlmcap.plugins import use_plugins


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with own_registries(monkeypatch):
        use_plugins([plugin_file(tmp_path, "my_format", PARTS["my_format"])])
        yield


def test_its_clips_are_read_into_splits(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("a\ta.mp4\ttrain\t바다.\nb\tb.mp4\tval\t산.\n", encoding="utf-8")
    config = compose(["data=lines", f"data.root={tmp_path}", "data.file=list.tsv", f"paths.cache_dir={tmp_path}"])
    clips = load_splits(config, (Split.train, Split.val))
    assert [(clip.id, clip.captions) for split in clips.values() for clip in split] == [
        ("a", ("바다.",)),
        ("b", ("산.",)),
    ]


def test_what_a_reader_raises_is_one_sentence(tmp_path: Path) -> None:
    config = compose(["data=lines", f"data.root={tmp_path}", f"paths.cache_dir={tmp_path}"])
    with pytest.raises(
        UserError, match=r"the reader of data=lines failed \(FileNotFoundError: .*\); check data\.root="
    ) as error:
        load_splits(config, (Split.train,))
    assert "\n" not in str(error.value)
