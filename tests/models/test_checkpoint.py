"""Where a checkpoint is, the fingerprint of what it holds, and which of its files are opened for single tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmcap.errors import UserError, first_line
from vlmcap.models import checkpoint as checkpoints
from vlmcap.models.checkpoint import fingerprint, locate, read_safetensors
from vlmcap.models.encoders import EncoderOptions, load_encoder
from vlmcap.models.projectors import ProjectorSpec, build_projector, load_projector_weights


def test_a_folder_is_taken_as_it_is(siglip_folder: Path) -> None:
    assert locate(str(siglip_folder), None, key="encoder.checkpoint") == siglip_folder


def test_a_hub_id_without_network_is_one_sentence() -> None:
    with pytest.raises(UserError) as caught:
        locate("nobody/no-such-model", None, key="encoder.checkpoint", gate="DINOv3 License")
    sentence = str(caught.value)
    for part in ("'nobody/no-such-model'", "encoder.checkpoint", "accept its licence", "DINOv3 License", "hf auth login"):
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


class FakeHub:
    """Stands for the hub: lists files, and remembers what was asked to be fetched."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names = folder, names
        self.is_reachable, self.is_cached = True, True
        self.asked: list[dict[str, object]] = []

    def list_repo_files(self, checkpoint: str, *, revision: str | None) -> list[str]:
        if not self.is_reachable:
            raise ConnectionError("no route")
        return list(self.names)

    def snapshot_download(self, checkpoint: str, **options: object) -> str:
        self.asked.append({"checkpoint": checkpoint, **options})
        if options.get("local_files_only") and not self.is_cached:
            raise FileNotFoundError("no snapshot")
        return str(self.folder)

    def fetched(self) -> set[str]:
        """Names of the last call that its patterns let through."""
        from huggingface_hub.utils import filter_repo_objects

        return set(filter_repo_objects(self.names, allow_patterns=self.asked[-1]["allow_patterns"]))  # type: ignore[arg-type]


BESIDE = ("config.json", "tokenizer.model", "chat_template.jinja")
NEVER = ("training_args.bin", "optimizer.bin", "modeling_x.py", "README.md", "tf_model.h5", "model.pkl", "onnx/pytorch_model.bin")


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> FakeHub:
    import huggingface_hub

    fake = FakeHub(folder, *names)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fake.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        (("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), ("pytorch_model-00001-of-00001.bin",)),
        (("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"), ()),
        (("pytorch_model.bin",), ("adapter_model.safetensors", "onnx/model.safetensors")),
        (("model.safetensors",), ("consolidated.safetensors",)),
    ],
)
def test_pickled_weights_are_fetched_only_where_there_are_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: tuple[str, ...], others: tuple[str, ...]
) -> None:
    fake = hub(monkeypatch, tmp_path, *BESIDE, *NEVER, *weights, *others)
    assert locate("lmsys/vicuna-7b-v1.5", "abc", key="llm.checkpoint") == tmp_path
    assert fake.asked[-1]["revision"] == "abc"
    assert fake.fetched() == {*BESIDE, *weights}


WEIGHT_MAP = {
    "vision_tower.layers.0.weight": "model-00001-of-00003.safetensors",
    "language_model.layers.0.weight": "model-00001-of-00003.safetensors",
    "language_model.layers.1.weight": "model-00002-of-00003.safetensors",
    "vision_tower.layers.1.weight": "model-00003-of-00003.safetensors",
}


def test_only_the_files_of_the_wanted_part_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An InternVL of 77 GB is not downloaded for its vision tower."""
    import huggingface_hub

    index = tmp_path / "model.safetensors.index.json"
    fake = hub(monkeypatch, tmp_path, "config.json", index.name, *set(WEIGHT_MAP.values()))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda checkpoint, name, revision: str(tmp_path / name))
    for weights, expected in ((WEIGHT_MAP, {1, 3}), ({"layers.0.weight": "model-00002-of-00003.safetensors"}, {2})):
        index.write_text(json.dumps({"weight_map": weights}))
        locate("OpenGVLab/InternVL3-38B-hf", None, key="encoder.checkpoint", part="vision_")
        assert fake.fetched() == {"config.json", index.name, *(f"model-0000{number}-of-00003.safetensors" for number in expected)}
    locate("OpenGVLab/InternVL3-38B-hf", None, key="model.checkpoint")
    assert fake.fetched() == set(fake.names)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"vision_tower.a": name}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not in its own folder"):
        fingerprint(tmp_path, "a", part="vision_")


def test_the_fingerprint_of_a_part_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    for file in set(WEIGHT_MAP.values()) - {"model-00002-of-00003.safetensors"}:
        (tmp_path / file).write_bytes(file.encode())
    before, whole = fingerprint(tmp_path, "a", part="vision_"), fingerprint(tmp_path, "a")
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"fetched later, for the language model")
    assert fingerprint(tmp_path, "a", part="vision_") == before
    assert fingerprint(tmp_path, "a") != whole
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"changed")
    assert fingerprint(tmp_path, "a", part="vision_") != before


def test_without_the_hub_an_earlier_snapshot_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = hub(monkeypatch, tmp_path)
    fake.is_reachable = False
    assert locate("lmsys/vicuna-7b-v1.5", None, key="llm.checkpoint") == tmp_path
    assert fake.asked == [{"checkpoint": "lmsys/vicuna-7b-v1.5", "revision": None, "local_files_only": True}]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": WEIGHT_MAP}))
    for number in (1, 3):
        (tmp_path / f"model-0000{number}-of-00003.safetensors").write_bytes(b"")
    assert locate("lmsys/vicuna-7b-v1.5", None, key="encoder.checkpoint", part="vision_") == tmp_path
    with pytest.raises(UserError, match="ConnectionError"):  # only the vision tower's files are there
        locate("lmsys/vicuna-7b-v1.5", None, key="llm.checkpoint")
    fake.is_cached = False
    with pytest.raises(UserError, match=r"ConnectionError.*llm\.checkpoint"):
        locate("lmsys/vicuna-7b-v1.5", None, key="llm.checkpoint")


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
def test_an_index_that_leads_out_of_its_folder_is_refused_by_every_reader(outside: str, clip_folder: Path, tmp_path: Path) -> None:
    config = (clip_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    names = ("embeddings.class_embedding", "multi_modal_projector.linear_1.weight")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, outside)}))
    with pytest.raises(UserError, match="not in its own folder"):
        load_encoder(tmp_path, EncoderOptions(-1, torch.float32))
    with pytest.raises(UserError, match="not in its own folder"):
        load_projector_weights(build_projector(ProjectorSpec("mlp", 2, 2, (2, 2), 1)), tmp_path)


def test_an_error_without_words_is_told_by_its_kind() -> None:
    assert first_line(EOFError()) == "EOFError"
    assert first_line(ValueError("\none\ntwo")) == "one"
