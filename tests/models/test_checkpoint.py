"""Where a checkpoint is, and the fingerprint of what it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlmcap.errors import UserError
from vlmcap.models import checkpoint as checkpoints
from vlmcap.models.checkpoint import fingerprint, locate


def test_a_folder_is_taken_as_it_is(siglip_folder: Path) -> None:
    assert locate(str(siglip_folder), None, key="encoder.checkpoint") == siglip_folder


def test_a_hub_id_without_network_is_one_sentence() -> None:
    with pytest.raises(UserError) as caught:
        locate("nobody/no-such-model", None, key="encoder.checkpoint", gate="DINOv3 License")
    sentence = str(caught.value)
    for part in ("'nobody/no-such-model'", "encoder.checkpoint", "accept its licence", "DINOv3 License"):
        assert part in sentence
    assert "\n" not in sentence


def test_no_licence_is_spoken_of_where_there_is_no_gate() -> None:
    with pytest.raises(UserError) as caught:
        locate("nobody/no-such-model", None, key="llm.checkpoint")
    assert "llm.checkpoint" in str(caught.value)
    assert "licence" not in str(caught.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llm\.checkpoint"):
        locate(str(tmp_path / "missing"), None, key="llm.checkpoint")


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json; llm\.checkpoint"):
        locate(str(tmp_path), None, key="llm.checkpoint")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_changed_byte_changes_the_fingerprint(llm_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(llm_folder, tmp_path / "copy")
    before = fingerprint(folder, "a")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert fingerprint(folder, "a").sha256 != before.sha256


def test_the_fingerprint_is_of_content_not_of_place(llm_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llm_folder, tmp_path / "copy")
    first, second = fingerprint(llm_folder, "a"), fingerprint(copy, "b")
    assert first.sha256 == second.sha256
    assert (first.name, second.name) == ("a", "b")
    assert first.as_dict() == {"name": "a", "revision": "", "sha256": first.sha256}


def test_a_downloaded_snapshot_names_its_commit(llm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llm_folder, tmp_path / "snapshots" / "0123abcd")
    assert fingerprint(folder, "a").revision == "0123abcd"


def test_the_memo_saves_reading_and_notices_a_change(llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, memo = shutil.copytree(llm_folder, tmp_path / "copy"), tmp_path / "deep" / "memo.json"
    first = fingerprint(folder, "a", memo)
    read: list[str] = []
    hash_file = checkpoints._file_sha256
    monkeypatch.setattr(checkpoints, "_file_sha256", lambda file: read.append(file.name) or hash_file(file))
    assert fingerprint(folder, "a", memo) == first
    assert read == []
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert fingerprint(folder, "a", memo).sha256 != first.sha256
    assert read == ["config.json"]


def test_a_torn_memo_is_written_anew(llm_folder: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    memo.write_text('{"torn')
    assert fingerprint(llm_folder, "a", memo) == fingerprint(llm_folder, "a")
    assert json.loads(memo.read_text())
