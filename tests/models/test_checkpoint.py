"""Checkpoints are located and fingerprinted, and only the necessary files are opened for single tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmcap.config import MlpConfig, Temporal
from vlmcap.errors import UserError, first_line
from vlmcap.models import checkpoint as checkpoints
from vlmcap.models.checkpoint import fingerprint, locate, read_safetensors
from vlmcap.models.encoders import EncoderOptions, load_encoder
from vlmcap.models.projectors import ProjectorSizes, build_projector, load_projector_weights


def test_a_folder_is_taken_as_it_is(siglip_folder: Path) -> None:
    assert locate(str(siglip_folder), None, key="encoder.checkpoint") == siglip_folder


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


def test_the_memo_saves_reading_and_notices_a_change(
    llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


WEIGHT_MAP = {
    "vision_tower.layers.0.weight": "model-00001-of-00003.safetensors",
    "language_model.layers.0.weight": "model-00001-of-00003.safetensors",
    "language_model.layers.1.weight": "model-00002-of-00003.safetensors",
    "vision_tower.layers.1.weight": "model-00003-of-00003.safetensors",
}


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"vision_tower.a": name}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="outside its own folder"):
        fingerprint(tmp_path, "a", tensor_filter="vision_")


def test_the_fingerprint_of_a_part_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    for file in set(WEIGHT_MAP.values()) - {"model-00002-of-00003.safetensors"}:
        (tmp_path / file).write_bytes(file.encode())
    before, whole = fingerprint(tmp_path, "a", tensor_filter="vision_"), fingerprint(tmp_path, "a")
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"fetched later, for the language model")
    assert fingerprint(tmp_path, "a", tensor_filter="vision_") == before
    assert fingerprint(tmp_path, "a") != whole
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"changed")
    assert fingerprint(tmp_path, "a", tensor_filter="vision_") != before


def test_pickled_weights_count_where_they_are_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"1")
    (tmp_path / "training_args.bin").write_bytes(b"1")
    before = fingerprint(tmp_path, "a")
    (tmp_path / "training_args.bin").write_bytes(b"2")
    assert fingerprint(tmp_path, "a") == before
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"2")
    assert fingerprint(tmp_path, "a") != before
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path, "a")
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"3")
    assert fingerprint(tmp_path, "a") == before


def test_files_without_a_wanted_tensor_are_not_opened(tmp_path: Path) -> None:
    save_file({"a.1": torch.ones(2), "b.1": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"not opened")
    files = {"a.1": "one.safetensors", "b.1": "one.safetensors", "b.2": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = dict(read_safetensors(tmp_path, lambda name: name.startswith("a.")))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a.1": [1, 1]}
    assert dict(read_safetensors(tmp_path / "nothing", lambda name: True)) == {}


@pytest.mark.parametrize("outside", ["../other.safetensors", "/other.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused_by_every_reader(
    outside: str, clip_folder: Path, tmp_path: Path
) -> None:
    config = (clip_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    names = ("embeddings.class_embedding", "multi_modal_projector.linear_1.weight")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, outside)}))
    with pytest.raises(UserError, match="outside its own folder"):
        load_encoder(tmp_path, EncoderOptions(-1, torch.float32))
    with pytest.raises(UserError, match="outside its own folder"):
        load_projector_weights(
            build_projector(MlpConfig(temporal=Temporal.none), ProjectorSizes(2, 2, (2, 2), 1)), tmp_path
        )


def test_an_error_without_words_is_told_by_its_kind() -> None:
    assert first_line(EOFError()) == "EOFError"
    assert first_line(ValueError("\none\ntwo")) == "one"
