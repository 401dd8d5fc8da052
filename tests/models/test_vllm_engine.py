"""vLLM receives the same prompts and settings as the native path.

The same settings in its words, prompts without padding, a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.config import EvaluationConfig
from vlmcap.errors import UserError
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.llm.load import load_language_model
from vlmcap.models.vllm import engine as vllm_engine
from vlmcap.models.vllm.captioner import TokenEmbeddings
from vlmcap.models.vllm.engine import (
    VllmEngine,
    VllmSubprocess,
    check_vllm,
    engine_arguments,
    sampling_arguments,
    start_engine,
)


def test_greedy_search() -> None:
    found = sampling_arguments(GenerationSettings(12), [3, 4])
    assert found == {"max_tokens": 12, "stop_token_ids": [3, 4], "detokenize": False, "temperature": 0.0}


def test_sampling() -> None:
    found = sampling_arguments(
        GenerationSettings(12, EvaluationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=0)), [3]
    )
    assert (found["temperature"], found["top_p"], found["top_k"]) == (0.7, 0.9, 0)


@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"no_repeat_ngram_size": 3}, {"repetition_penalty": 1.1}])
def test_what_vllm_cannot_do_is_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(UserError, match=rf"evaluation\.{name}={setting[name]} "):
        sampling_arguments(GenerationSettings(12, EvaluationConfig(**setting)), [3])


def test_embeddings_are_those_of_the_model(llm_folder: Path, tmp_path: Path) -> None:
    model: Any = load_language_model(
        llm_folder, dtype=torch.float32, quantization="none", attention="sdpa", device="cpu"
    )
    ids = torch.arange(20)
    table: Any = TokenEmbeddings(llm_folder, torch.float32)
    assert torch.equal(table.get_input_embeddings()(ids), model.get_input_embeddings()(ids))
    assert sum(p.numel() for p in table.parameters()) == model.get_input_embeddings().weight.numel()
    (tmp_path / "config.json").write_bytes((llm_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"holds no model\.embed_tokens\.weight"):
        TokenEmbeddings(tmp_path, torch.float32)


# --- no vLLM, another one, a broken one -------------------------------------------------------------------------------


def test_no_vllm_is_one_sentence_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs vLLM, which is not installed here; .* set evaluation\.vllm_python="):
        check_vllm(None)
    with pytest.raises(UserError, match=r"vllm_python=.*missing cannot be run"):
        check_vllm(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"cannot import vllm \(ModuleNotFoundError.*pip install vllm"):
        check_vllm(str(interpreter(tmp_path, None)))


def interpreter(folder: Path, vllm: str | None) -> Path:
    """Creates an interpreter whose vllm module is this source; None creates one without vllm."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    (packages / "vllm.py").write_text("raise ModuleNotFoundError(\"No module named 'vllm'\")" if vllm is None else vllm)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


def start(python: Path) -> VllmEngine:
    arguments = engine_arguments(
        Path("merged"), EvaluationConfig(vllm_gpu_memory=0.5), dtype="float32", max_model_len=64, seed=0
    )
    return start_engine(arguments, str(python))


ECHO = """
import os, sys
print("vLLM talks on standard output")
class SamplingParams:
    def __init__(self, **arguments): self.arguments = arguments
class LLM:
    def __init__(self, **arguments):
        assert arguments["enable_prompt_embeds"] and arguments["model"] == "merged", arguments
        os.system("echo so do its processes")
    def generate(self, prompts, sampling, use_tqdm):
        class Output: pass
        outputs = []
        for prompt in prompts:
            rows = prompt["prompt_embeds"]
            if len(rows) == 9: raise ValueError("too long\\nfor this")
            if len(rows) == 8: os._exit(3)
            output = Output(); output.token_ids = (len(rows), int(rows.sum()), sampling.arguments["max_tokens"])
            outer = Output(); outer.outputs = [output]
            outputs.append(outer)
        return outputs
"""


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """It may print; it survives the error of a batch; its end is reported."""
    python = interpreter(tmp_path, ECHO)
    check_vllm(str(python))
    engine = start(python)
    assert isinstance(engine, VllmSubprocess)
    prompts = [torch.ones(3, 2), torch.ones(5, 2, dtype=torch.bfloat16)]
    assert engine.generate(prompts, {"max_tokens": 7}) == [[3, 6, 7], [5, 10, 7]]
    with pytest.raises(UserError, match=r"could not caption a batch \(ValueError: too long\)"):
        engine.generate([torch.ones(9, 2)], {"max_tokens": 7})
    assert engine.generate(prompts[:1], {"max_tokens": 8}) == [[3, 6, 8]]
    with pytest.raises(UserError, match="its process ended with exit code 3"):
        engine.generate([torch.ones(8, 2)], {"max_tokens": 7})
    engine.close()


def test_it_ends_with_us(tmp_path: Path) -> None:
    engine = start(interpreter(tmp_path, ECHO))
    assert isinstance(engine, VllmSubprocess)
    process = engine._process
    del engine
    assert process.poll() == 0


def test_a_card_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "ValueError('No available memory for the cache blocks.')"
    broken = f"class LLM:\n    def __init__(self, **_):\n        raise {error}\n"
    with pytest.raises(
        UserError, match=r"did not start \(ValueError: No available memory.*lower evaluation\.vllm_gpu_memory"
    ):
        start(interpreter(tmp_path, broken))
