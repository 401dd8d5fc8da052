"""Single tensors out of a checkpoint: only the files that hold them, and never a file outside of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmcap.errors import UserError, first_line
from vlmcap.models.encoders import EncoderOptions, load_encoder
from vlmcap.models.projectors import ProjectorSpec, build_projector, load_projector_weights
from vlmcap.models.tensors import read_safetensors


def test_files_without_a_wanted_tensor_are_not_opened(tmp_path: Path) -> None:
    save_file({"a.1": torch.ones(2), "b.1": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"not opened")
    files = {"a.1": "one.safetensors", "b.1": "one.safetensors", "b.2": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = dict(read_safetensors(tmp_path, lambda name: name.startswith("a.")))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a.1": [1, 1]}
    assert dict(read_safetensors(tmp_path / "nothing", lambda name: True)) == {}


@pytest.mark.parametrize("outside", ["../other.safetensors", "/other.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused_by_every_reader(outside: str, clip_folder: Path, tmp_path: Path) -> None:
    config = (clip_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    names = ("embeddings.class_embedding", "multi_modal_projector.linear_1.weight")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, outside)}))
    with pytest.raises(UserError, match="not in its own folder"):
        load_encoder("clip", tmp_path, EncoderOptions(-1, torch.float32))
    with pytest.raises(UserError, match="not in its own folder"):
        load_projector_weights(build_projector(ProjectorSpec("mlp", 2, 2, (2, 2), 1)), tmp_path)


def test_an_error_without_words_is_told_by_its_kind() -> None:
    assert first_line(EOFError()) == "EOFError"
    assert first_line(ValueError("\none\ntwo")) == "one"
