"""vLLM, started here or in an environment of its own, and asked to continue prompts of embeddings.

Legend: S prompt tokens, Dl language width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vlmcap.config import EvaluationConfig
from vlmcap.errors import UserError, first_line
from vlmcap.models.decoding.settings import GenerationSettings
from vlmcap.models.vllm import worker as vllm_worker

_ENGINE = "evaluation.engine=vllm"


def engine_arguments(
    folder: Path, evaluation: EvaluationConfig, *, dtype: str, max_model_len: int, seed: int
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`.

    Args:
        folder: Language model in Hugging Face layout, adapters merged.
        evaluation: Share of the GPU's memory that vLLM takes.
        dtype: Type of weights and arithmetic, such as "bfloat16".
        max_model_len: Most tokens of a prompt and its caption.
        seed: Seed of sampling.
    """
    return {
        "model": str(folder),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": evaluation.vllm_gpu_memory,
        "seed": seed,
        "enable_prompt_embeds": True,
        # Clips share no more of their prompts than a few words, so there is nothing to gain by keeping them.
        "enable_prefix_caching": False,
        "generation_config": "vllm",  # what a caption is decoded with stands in each request, and nothing else counts
    }


class VllmEngine(Protocol):
    """Whoever continues prompts."""

    def generate(self, prompts: Sequence[Tensor], sampling: dict[str, Any]) -> list[list[int]]:
        """Generated ids of each prompt (S, Dl), in order."""


def sampling_arguments(settings: GenerationSettings, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` that decode as transformers does with these settings.

    Raises:
        UserError: vLLM has no such thing, or not for prompts that are embeddings.
    """
    rules = settings.rules
    if rules.num_beams > 1:
        beams = rules.num_beams
        raise UserError(
            f"evaluation.num_beams={beams} is not to be had with {_ENGINE}; set it to 1, or evaluation.engine=native"
        )
    if rules.no_repeat_ngram_size:
        size = rules.no_repeat_ngram_size
        raise UserError(
            f"evaluation.no_repeat_ngram_size={size} is unknown to vLLM; set it to 0, or evaluation.engine=native"
        )
    if rules.repetition_penalty != 1.0:
        # It counts the ids of the prompt too, and a prompt of embeddings has none:
        # https://github.com/vllm-project/vllm/issues/57719.
        penalty = rules.repetition_penalty
        raise UserError(
            f"evaluation.repetition_penalty={penalty} stops vLLM where prompts are embeddings (vLLM issue 57719); "
            "set it to 1, or evaluation.engine=native"
        )
    arguments: dict[str, Any] = {
        "max_tokens": settings.max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "detokenize": False,
    }
    if not rules.do_sample:
        return arguments | {"temperature": 0.0}
    return arguments | {"temperature": rules.temperature, "top_p": rules.top_p, "top_k": rules.top_k}


def check_vllm(python: str | None) -> None:
    """`UserError` unless there is a vLLM to start."""
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"{_ENGINE} needs vLLM, which is not installed here; install it in an environment of its own "
                "(python -m venv vllm-env && vllm-env/bin/pip install vllm) and set "
                "evaluation.vllm_python=vllm-env/bin/python"
            )
        return
    try:
        found = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"evaluation.vllm_python={python} cannot be run ({type(error).__name__}); name a Python interpreter"
        ) from error
    if found.returncode != 0:
        reason = next(iter(reversed(found.stderr.strip().splitlines())), "no message")
        raise UserError(
            f"evaluation.vllm_python={python} cannot import vllm ({reason}); install it there with pip install vllm"
        )


def start_engine(arguments: dict[str, Any], python: str | None) -> VllmEngine:
    """vLLM, started here or in its own environment.

    Args:
        arguments: As `engine_arguments` returns them.
        python: Interpreter of an environment with vLLM; None for this one.

    Raises:
        UserError: It does not start.
    """
    if python is not None:
        return OtherProcess(arguments, python)
    try:
        return ThisProcess(vllm_worker.start(arguments))
    except Exception as error:  # vLLM raises many kinds; most are a GPU that is too small
        raise _not_started(f"{type(error).__name__}: {first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class ThisProcess:
    """vLLM that is installed beside us.

    Attributes:
        llm: vLLM's `LLM`.
    """

    llm: Any

    def generate(self, prompts: Sequence[Tensor], sampling: dict[str, Any]) -> list[list[int]]:
        """Generated ids of each prompt (S, Dl), in order."""
        return vllm_worker.ask(self.llm, [prompt.cpu() for prompt in prompts], sampling)


class OtherProcess:
    """vLLM in an environment of its own, as its versions of torch and transformers are not ours.

    Args:
        arguments: As `engine_arguments` returns them.
        python: Interpreter of that environment.

    Raises:
        UserError: It does not start.
    """

    def __init__(self, arguments: dict[str, Any], python: str) -> None:
        # -P: the folder of the program is no place to import from, as vLLM would find our modules there.
        command = [python, "-P", str(Path(vllm_worker.__file__))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.close = weakref.finalize(self, _end, self._process)
        answer = self._ask({"engine": arguments})
        if "error" in answer:
            self.close()
            raise _not_started(answer["error"])

    def generate(self, prompts: Sequence[Tensor], sampling: dict[str, Any]) -> list[list[int]]:
        """Generated ids of each prompt (S, Dl), in order."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(prefix="vlmcap-vllm-") as folder:
            file = Path(folder) / "prompts.safetensors"
            save_file({str(index): prompt.cpu().contiguous() for index, prompt in enumerate(prompts)}, file)
            answer = self._ask({"file": str(file), "count": len(prompts), "sampling": sampling})
        if "error" in answer:
            raise UserError(
                f"vLLM could not caption a batch ({answer['error']}); see its own lines above, or set "
                "evaluation.engine=native"
            )
        ids: list[list[int]] = answer["ids"]
        return ids

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"its process ended with exit code {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[str]) -> None:
    """Ends vLLM's process: its input is over, and that is what it waits for."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.stdout.close()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _not_started(reason: str) -> UserError:
    return UserError(
        f"vLLM did not start ({reason}); lower evaluation.vllm_gpu_memory if the GPU is too full, or set "
        "evaluation.engine=native"
    )
