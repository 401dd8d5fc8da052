"""A plan of checkpoints on a hub: the numbers are those of the same folders, and no weights are downloaded for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.encoders import Checkpoint
from tests.checkpoints.hub import TOKEN, Hub, commit_of
from tests.models.test_hub import SENTENCES
from vlmcap.assembly.base_checkpoints import locate_base_checkpoints
from vlmcap.cli import main
from vlmcap.compose import compose
from vlmcap.config import Config
from vlmcap.errors import UserError
from vlmcap.models.known import known_config
from vlmcap.planning.estimate.meta_models import architecture, text_config
from vlmcap.planning.estimate.sizes import clip_sizes, download_bytes, key_value_bytes
from vlmcap.planning.make_plan import enforce_plan, make_plan

LLM, ENCODER, WHOLE = "someone/llm", "someone/encoder", "someone/vlm"
GPU = ("data.root=unset", "data.num_frames=2", "hardware=l4")
PARTS = (
    *GPU,
    "encoder=siglip2",
    "llm=qwen3_8b",
    "llm.max_caption_tokens=64",
    "llm.max_new_tokens=64",
    "projector.frame_stack=1",
)
WHOLE_MODEL = (*GPU, "model=qwen2_5_vl_7b", "llm.max_caption_tokens=64", "llm.max_new_tokens=64")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory profiles of each test in its own folder, so that equal numbers are computed twice."""
    monkeypatch.setenv("VLMCAP_CACHE_DIR", str(tmp_path / "cache"))


def planned(overrides: Sequence[str]) -> dict[str, Any]:
    return make_plan(compose(list(overrides))).plain()


def publish(hub: Hub, siglip_folder: Path, llm_folder: Path) -> tuple[list[str], list[str]]:
    """Overrides that name both components by id, and by folder."""
    hub.add(LLM, llm_folder)
    hub.add(ENCODER, siglip_folder)
    by_id = [*PARTS, f"llm.checkpoint={LLM}", f"encoder.checkpoint={ENCODER}"]
    return by_id, [*PARTS, f"llm.checkpoint={llm_folder}", f"encoder.checkpoint={siglip_folder}"]


@pytest.mark.slow
def test_a_plan_by_id_is_the_plan_by_folder(
    hub_here: Hub, siglip_folder: Path, llm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_id, by_folder = publish(hub_here, siglip_folder, llm_folder)
    found, expected = planned(by_id), planned(by_folder)
    assert found.pop("download_bytes") > expected.pop("download_bytes") == 0
    assert (found.pop("model"), expected.pop("model")) == (
        "encoder + mlp + llm",
        f"{siglip_folder.name} + mlp + {llm_folder.name}",
    )
    assert found == expected
    assert hub_here.fetched(LLM) == {"config.json"}
    assert hub_here.fetched(ENCODER) == {"config.json", "preprocessor_config.json"}

    before = len(hub_here.log)
    main(["plan", *by_id])
    assert "B to download" in capsys.readouterr().out
    enforce_plan(compose(by_id))  # as training does
    assert len(hub_here.log) == before  # a program asks once
    main(["plan", *by_folder])
    assert "for stored features, nothing to download" in capsys.readouterr().out


def test_what_was_downloaded_is_not_to_be_downloaded(hub_here: Hub, siglip_folder: Path, llm_folder: Path) -> None:
    by_id, _ = publish(hub_here, siglip_folder, llm_folder)
    config = compose(by_id)
    language, vision = (
        (folder / "model.safetensors").stat().st_size / 2 for folder in (llm_folder, siglip_folder)
    )  # stored in 32 bits
    assert download_bytes(config) == pytest.approx(language + vision, rel=0.1)
    locate_base_checkpoints(config, is_encoder_only=True)
    assert download_bytes(config) == pytest.approx(language, rel=0.1)
    locate_base_checkpoints(config)
    assert download_bytes(config) == 0


def test_the_demo_downloads_nothing() -> None:
    assert download_bytes(compose(["data.root=unset"])) == 0


def test_a_pretrained_vlm_is_described_by_its_id(hub_here: Hub, qwen_folders: dict[str, Path]) -> None:
    folder = qwen_folders["qwen2_5_vl"]
    hub_here.add(WHOLE, folder)
    by_id, by_folder = (compose([*WHOLE_MODEL, f"model.checkpoint={name}"]) for name in (WHOLE, folder))
    assert clip_sizes(by_id) == clip_sizes(by_folder)
    assert architecture(by_id, "model") == architecture(by_folder, "model")
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    assert download_bytes(by_id) == pytest.approx(size / 2, rel=0.1)
    assert hub_here.fetched() == {"config.json"}
    locate_base_checkpoints(by_id)
    assert download_bytes(by_id) == download_bytes(by_folder) == 0


@pytest.mark.slow
def test_a_pretrained_vlm_is_planned_by_its_id(hub_here: Hub, qwen_folders: dict[str, Path]) -> None:
    folder = qwen_folders["qwen2_5_vl"]
    hub_here.add(WHOLE, folder)
    found, expected = (planned([*WHOLE_MODEL, f"model.checkpoint={name}"]) for name in (WHOLE, folder))
    assert found.pop("download_bytes") > expected.pop("download_bytes") == 0
    assert (found.pop("model"), expected.pop("model")) == (WHOLE.rpartition("/")[2], folder.name)
    assert found == expected


def test_the_revision_decides(hub_here: Hub, siglip_folder: Path, llm_folder: Path, moe_folder: Path) -> None:
    config = compose(publish(hub_here, siglip_folder, llm_folder)[0])
    hub_here.add(LLM, llm_folder, experts=moe_folder)
    assert architecture(config, "llm")["model_type"] == "qwen3"
    for revision in ("experts", commit_of(moe_folder)):
        assert architecture(at_revision(config, revision), "llm")["model_type"] == "qwen3_moe"


def at_revision(config: Config, revision: str) -> Config:
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, revision=revision))


def test_packaged_values_are_used_at_once_and_where_there_is_no_hub(hub_here: Hub, llm_folder: Path) -> None:
    config, known = compose([*PARTS]), known_config("Qwen/Qwen3-8B")
    assert architecture(config, "llm") == known
    assert hub_here.log == []
    pinned = at_revision(config, "v2")
    repository = hub_here.add("Qwen/Qwen3-8B", llm_folder, v2=llm_folder)
    repository.fault = "out of order"
    assert architecture(pinned, "llm") == known
    repository.fault = ""
    assert architecture(pinned, "llm")["hidden_size"] == 64
    with pytest.raises(UserError, match="has no revision 'v3'"):
        architecture(at_revision(config, "v3"), "llm")


@pytest.mark.parametrize("side", [32, 64])
def test_an_image_processor_decides_the_grid_of_a_rotary_encoder(
    hub_here: Hub, checkpoints: dict[str, Checkpoint], tmp_path: Path, side: int
) -> None:
    """DINOv3 takes frames of any size, and its processor says which it is given."""
    folder = shutil.copytree(checkpoints["dinov3"].folder, tmp_path / "dinov3")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": side, "width": side}}))
    hub_here.add(ENCODER, folder)
    overrides = [*PARTS, "encoder=dinov3_s", "projector.reducer=none"]
    found = clip_sizes(compose([*overrides, f"encoder.checkpoint={ENCODER}"]))
    assert found.num_visual == 2 * (side // 16) ** 2
    assert found == clip_sizes(compose([*overrides, f"encoder.checkpoint={folder}"]))


@pytest.mark.parametrize("fault", SENTENCES)
@pytest.mark.parametrize("key", ["llm", "encoder"])
def test_a_fault_is_one_sentence_of_the_command(
    hub_here: Hub, siglip_folder: Path, llm_folder: Path, key: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    by_id, _ = publish(hub_here, siglip_folder, llm_folder)
    hub_here.repositories[f"someone/{key}"].fault = fault
    with pytest.raises(SystemExit) as caught:
        main(["plan", *by_id])
    assert caught.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert (
        SENTENCES[fault].partition("accept")[0].replace("someone/model", f"someone/{key}").replace("llm.", f"{key}.")
        in sentence
    )
    assert TOKEN not in sentence


def test_a_class_that_is_not_installed_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of_the_future"}')
    with pytest.raises(
        UserError,
        match=r"llm\.checkpoint=.* has the model_type 'of_the_future', which the installed transformers .* know",
    ):
        planned([*PARTS, f"llm.checkpoint={tmp_path}"])


def test_a_folder_without_configuration_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json; llm\.checkpoint must name"):
        planned([*PARTS, f"llm.checkpoint={tmp_path}"])


def test_a_short_hybrid_model_keeps_a_layer_with_keys_and_values() -> None:
    """Three of four layers of Qwen3.5 keep a state instead, and a cache of such layers alone has no length."""
    config = compose(["model=qwen3_5_4b", "hardware=l4"])
    assert text_config(config, 1).layer_types == ["full_attention"]
    assert text_config(config, 2).layer_types == ["linear_attention", "full_attention"]
    assert text_config(config, 4).layer_types == text_config(config).layer_types[:4]
    assert key_value_bytes(config) == 2 * 8 * 4 * 256 * 2  # two tensors, 8 layers, 4 heads of 256 bfloat16
