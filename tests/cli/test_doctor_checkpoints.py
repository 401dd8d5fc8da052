"""`vlmcap doctor llm.checkpoint=…`: the table of a checkpoint, the verdict in the last line, and the exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlmcap.cli import main


def test_a_language_model_is_described_and_ready(
    llm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(llm_folder, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors")))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    main(["doctor", f"llm.checkpoint={folder}"])
    lines = capsys.readouterr().out.strip().splitlines()
    table = {line.split("  ")[0].strip(): line for line in lines[1:-1]}
    for name, text in {
        "class": "Qwen3ForCausalLM (qwen3)",
        "context": "512 tokens",
        "license": "apache-2.0",
        "decoding engine": "native",
    }.items():
        assert text in table[name]
    assert "<|im_end|> <|endoftext|>" in table["end tokens"]
    assert lines[-1] == f"Ready: llm.checkpoint={folder} can be used as it is."


def test_what_is_missing_is_the_last_line_and_the_exit_code(
    llm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(
        shutil.copytree(llm_folder, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    )
    with pytest.raises(SystemExit) as stop:
        main(["doctor", f"llm.checkpoint={folder}"])
    assert stop.value.code == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Not ready: ")
    assert "set llm.chat_template" in last
    template = "llm.chat_template='{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}'"
    main(["doctor", f"llm.checkpoint={folder}", template])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("Ready: ")


def test_an_encoder_and_json(llm_folder: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", f"llm.checkpoint={llm_folder}", f"encoder.checkpoint={clip_folder}", "encoder=clip", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["llm.checkpoint", "encoder.checkpoint"]
    encoder = found["encoder.checkpoint"]
    assert (encoder["model_class"], encoder["grid"], encoder["width"]) == ("CLIPVisionModel", [2, 2], 32)
    assert found["llm.checkpoint"]["model_type"] == "qwen3"


def test_a_folder_of_another_kind_is_one_sentence(siglip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", f"llm.checkpoint={siglip_folder}"])
    assert stop.value.code == 2
    assert "is not a causal language model" in capsys.readouterr().err
