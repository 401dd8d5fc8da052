"""Downloads from a hub, the cache, and one sentence for each kind of failure."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoints.hub import REFUSALS, TOKEN, Hub, commit_of
from vlmcap.errors import UserError
from vlmcap.libraries import silence_libraries
from vlmcap.models import hub as hub_module
from vlmcap.models.checkpoint import fingerprint, is_present, locate, locate_description
from vlmcap.models.hub import HubUnreachableError, hub_error

NAME = "someone/model"
BESIDE = ("config.json", "tokenizer.model", "chat_template.jinja")
NEVER = ("training_args.bin", "optimizer.bin", "modeling_x.py", "tf_model.h5", "model.pkl", "onnx/pytorch_model.bin")


def make_folder(folder: Path, *names: str) -> Path:
    """Files of a checkpoint whose content does not matter."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"file": "{name}"}}')
    return folder


def small_folder(folder: Path) -> Path:
    return make_folder(folder, *BESIDE, "model.safetensors")


def refused(
    checkpoint: str = NAME, revision: str | None = None, *, gate: str | None = None, is_plan: bool = False
) -> str:
    """Returns the message for a checkpoint that cannot be downloaded."""
    with pytest.raises(UserError) as caught:
        if is_plan:
            locate_description(checkpoint, revision, key="llm.checkpoint", gate=gate)
        else:
            locate(checkpoint, revision, key="llm.checkpoint", gate=gate)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "llm." in sentence
    assert TOKEN not in sentence
    return sentence


# --- what is fetched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            ("pytorch_model-00001-of-00001.bin",),
        ),
        (("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"), ()),
        (("pytorch_model.bin",), ("adapter_model.safetensors", "onnx/model.safetensors")),
        (("model.safetensors",), ("consolidated.safetensors",)),
    ],
)
def test_pickled_weights_are_fetched_only_where_there_are_no_others(
    hub_here: Hub, tmp_path: Path, weights: tuple[str, ...], others: tuple[str, ...]
) -> None:
    folder = make_folder(tmp_path / "model", *BESIDE, *NEVER, *weights, *others)
    hub_here.add(NAME, folder)
    found = locate(NAME, None, key="llm.checkpoint")
    assert hub_here.fetched() == {*BESIDE, *weights}
    assert {str(path.relative_to(found)) for path in found.rglob("*")} == {*BESIDE, *weights}
    assert all((found / name).read_bytes() == (folder / name).read_bytes() for name in weights)


WEIGHT_MAP = {
    "vision_tower.layers.0.weight": "model-00001-of-00003.safetensors",
    "language_model.layers.0.weight": "model-00001-of-00003.safetensors",
    "language_model.layers.1.weight": "model-00002-of-00003.safetensors",
    "vision_tower.layers.1.weight": "model-00003-of-00003.safetensors",
}
INDEX = "model.safetensors.index.json"


def sharded_folder(folder: Path, weights: dict[str, str] = WEIGHT_MAP) -> Path:
    make_folder(folder, "config.json", *set(WEIGHT_MAP.values()))
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))
    return folder


@pytest.mark.parametrize(
    ("weights", "expected"), [(WEIGHT_MAP, {1, 3}), ({"layers.0.weight": "model-00002-of-00003.safetensors"}, {2})]
)
def test_only_the_files_of_the_wanted_part_are_fetched(
    hub_here: Hub, tmp_path: Path, weights: dict[str, str], expected: set[int]
) -> None:
    """An InternVL of 77 GB is not downloaded for its vision tower."""
    hub_here.add(NAME, sharded_folder(tmp_path / "model", weights))
    locate(NAME, None, key="encoder.checkpoint", tensor_filter="vision_")
    assert hub_here.fetched() == {
        "config.json",
        INDEX,
        *(f"model-0000{number}-of-00003.safetensors" for number in expected),
    }
    assert is_present(NAME, None, "vision_")
    assert is_present(NAME, None) == (expected == {2})  # the only file that the index names
    locate(NAME, None, key="model.checkpoint")
    assert hub_here.fetched() == {"config.json", INDEX, *WEIGHT_MAP.values()}
    assert is_present(NAME, None)


def test_a_description_is_the_small_files_alone(hub_here: Hub, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", *BESIDE, "preprocessor_config.json", "model.safetensors")
    hub_here.add(NAME, folder)
    found = locate_description(NAME, None, key="llm.checkpoint")
    assert hub_here.fetched() == {"config.json"}
    assert (found / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert locate_description(NAME, None, key="encoder.checkpoint", has_processor=True) == found
    assert hub_here.fetched() == {"config.json", "preprocessor_config.json"}
    assert not is_present(NAME, None)
    assert {header.removeprefix("Bearer ") for header in hub_here.tokens} == {TOKEN}


@pytest.mark.parametrize("is_plan", [False, True])
def test_the_revision_is_kept(hub_here: Hub, tmp_path: Path, is_plan: bool) -> None:
    main, older = small_folder(tmp_path / "main"), small_folder(tmp_path / "older")
    (older / "config.json").write_text('{"file": "older"}')
    hub_here.add(NAME, main, older=older)
    find = locate_description if is_plan else locate
    for revision, expected in ((None, main), ("older", older), (commit_of(older), older), (commit_of(main), main)):
        found = find(NAME, revision, key="llm.checkpoint")
        assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()
        assert fingerprint(found, NAME, has_weights=False).revision == commit_of(expected)


def test_a_download_that_was_cut_goes_on_by_itself(hub_here: Hub, tmp_path: Path) -> None:
    repository = hub_here.add(NAME, folder := small_folder(tmp_path / "model"))
    repository.fault, repository.faulty = "cut once", "model.safetensors"
    found = locate(NAME, None, key="llm.checkpoint")
    assert repository.fault == ""
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# --- what is there already --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "hang", "out of order", "gated, no access"])
def test_without_the_hub_a_whole_earlier_download_is_taken(hub_here: Hub, tmp_path: Path, fault: str) -> None:
    repository = hub_here.add(NAME, sharded_folder(tmp_path / "model"))
    part = locate(NAME, None, key="encoder.checkpoint", tensor_filter="vision_")
    repository.fault = fault
    assert locate(NAME, None, key="encoder.checkpoint", tensor_filter="vision_") == part
    refused()  # only the vision tower's files are there
    assert locate_description(NAME, None, key="llm.checkpoint") == part


def test_what_a_plan_fetched_is_no_download(hub_here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_here.add(NAME, small_folder(tmp_path / "model"))
    found = locate_description(NAME, None, key="llm.checkpoint")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_description(NAME, None, key="llm.checkpoint") == found
    assert "HF_HUB_OFFLINE" in refused()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        locate(NAME, None, key="llm.checkpoint", has_weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert locate(NAME, None, key="llm.checkpoint", has_weights=False) == found
    assert "model.safetensors" not in hub_here.fetched()
    assert not is_present(NAME, None)
    assert locate(NAME, None, key="llm.checkpoint") == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_present(NAME, None)
    assert locate(NAME, None, key="llm.checkpoint") == found


# --- what goes wrong --------------------------------------------------------------------------------------------------

SENTENCES = {
    "gated, no account": "is gated and no account is logged in: accept its license (Some License) at "
    "https://huggingface.co/someone/model,",
    "gated, no access": "is gated and the account that is logged in has no access yet: accept its license (Some "
    "License) at",
    "no repository": "no folder 'someone/model' here, and the hub has no such model or it is private: correct "
    "llm.checkpoint, or log in",
    "bad token": "the hub does not accept this machine's token",
    "forbidden": "this machine's token may not read 'someone/model'",
    "busy": "after too many requests: wait some minutes",
    "out of order": "is out of order (HTTP 503), so 'someone/model' cannot be downloaded: try again later",
    "reset": "the connection broke off while 'someone/model' was downloaded: run the same command again",
    "cut": "the connection broke off while 'someone/model' was downloaded: run the same command again",
    "hang": "stopped answering when asked for 'someone/model': try again, raise the seconds of HF_HUB_ETAG_TIMEOUT=0.5",
    "no hub": "does not answer like a hub when asked for 'someone/model': check HF_ENDPOINT and the proxy",
}


@pytest.mark.parametrize("is_plan", [False, True], ids=["download", "plan"])
@pytest.mark.parametrize("fault", SENTENCES)
def test_each_fault_has_its_sentence(hub_here: Hub, tmp_path: Path, fault: str, is_plan: bool) -> None:
    hub_here.add(NAME, small_folder(tmp_path / "model")).fault = fault
    sentence = refused(gate="Some License", is_plan=is_plan)
    assert SENTENCES[fault] in sentence
    assert not any(text in sentence for text in SENTENCES.values() if text != SENTENCES[fault])
    message = REFUSALS.get(fault, (0, "", "no such message"))[2]
    assert message not in sentence  # what a server says is not repeated


@pytest.mark.parametrize("fault", ["cut", "reset", "hang"])
def test_a_fault_of_the_weights_alone_has_the_same_sentence(hub_here: Hub, tmp_path: Path, fault: str) -> None:
    repository = hub_here.add(NAME, small_folder(tmp_path / "model"))
    repository.fault, repository.faulty = fault, "model.safetensors"
    assert SENTENCES[fault] in refused()
    assert not is_present(NAME, None)
    assert locate_description(NAME, None, key="llm.checkpoint").is_dir()
    repository.fault = ""
    assert (locate(NAME, None, key="llm.checkpoint") / "model.safetensors").is_file()


@pytest.mark.parametrize("is_plan", [False, True])
def test_what_a_checkpoint_lacks(hub_here: Hub, tmp_path: Path, is_plan: bool) -> None:
    hub_here.add(NAME, make_folder(tmp_path / "gguf", "model.gguf", "README.md"))
    assert "has no config.json on the hub: llm.checkpoint must name a model" in refused(is_plan=is_plan)
    hub_here.add(NAME, small_folder(tmp_path / "model"))
    sentence = refused(revision="v2", is_plan=is_plan)
    assert "has no revision 'v2': set llm.revision to a branch, tag or commit of" in sentence
    assert "is neither a folder nor a hub id" in refused("some one/model", is_plan=is_plan)
    assert "there is no folder 'someone/else' here, and the hub has no such model" in refused(
        "someone/else", is_plan=is_plan
    )


@pytest.mark.parametrize("is_plan", [False, True])
def test_a_license_that_is_not_known_is_not_named(hub_here: Hub, tmp_path: Path, is_plan: bool) -> None:
    hub_here.add(NAME, small_folder(tmp_path / "model")).fault = "gated, no account"
    assert "accept its license at https://huggingface.co/someone/model, and log in with `hf auth login`" in refused(
        is_plan=is_plan
    )


@pytest.mark.parametrize("is_plan", [False, True])
def test_offline_is_one_sentence(is_plan: bool) -> None:
    sentence = refused("nobody/no-such-model", gate="Some License", is_plan=is_plan)
    assert "'nobody/no-such-model' is not on this machine, and HF_HUB_OFFLINE forbids its download" in sentence
    assert "Some License" not in sentence


def test_no_server_at_all(hub_here: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = "http://somebody:password@127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    sentence = refused(is_plan=True)
    assert sentence.startswith("127.0.0.1:9 cannot be reached for 'someone/model': check the network")
    assert "password" not in sentence
    with pytest.raises(HubUnreachableError):
        locate_description(NAME, None, key="llm.checkpoint")


def test_the_library_logs_no_address(hub_here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warnings contain complete addresses, with a mirror's password or the signature of a storage server."""
    endpoint = hub_here.endpoint.replace("//", "//somebody:password@")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    hub_here.add(NAME, small_folder(tmp_path / "model")).fault = "cut"
    logger, lines = logging.getLogger("huggingface_hub"), io.StringIO()
    before = logger.level
    logger.addHandler(handler := logging.StreamHandler(lines))
    logger.setLevel(logging.WARNING)  # whatever was called before in this process
    try:
        refused()
        assert "password" in lines.getvalue()
        lines.truncate(0)
        silence_libraries()
        refused()
        assert lines.getvalue() == ""
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def test_a_cache_that_cannot_be_written_to(hub_here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_here.add(NAME, small_folder(tmp_path / "model"))
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    assert "(Not a directory): make room there, set HF_HOME to another folder" in refused()


def test_an_error_of_another_kind_is_named() -> None:
    sentence = str(hub_error(RuntimeError("signed?token=abc"), NAME, None, key="llm.checkpoint"))
    assert sentence.startswith(
        "checkpoint 'someone/model' could not be downloaded (RuntimeError): try again, or set llm.checkpoint"
    )
    assert "abc" not in sentence


def test_the_endpoint_of_the_hub_is_shown_without_its_password() -> None:
    assert hub_module._host("https://somebody:password@hub.example:8443/path") == "hub.example:8443"
