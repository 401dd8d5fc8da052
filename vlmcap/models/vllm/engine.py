"""Starts vLLM in this process or in an environment of its own, and generates from prompt embeddings.

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
    """Returns the arguments of `vllm.LLM`.

    Args:
        folder: Language model in Hugging Face layout, with merged adapters.
        evaluation: Settings, of which the share of GPU memory is used.
        dtype: Dtype of weights and arithmetic, such as "bfloat16".
        max_model_len: Maximum tokens of a prompt with its caption.
        seed: Seed of sampling.
    """
    return {
        "model": str(folder),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": evaluation.vllm_gpu_memory,
        "seed": seed,
        "enable_prompt_embeds": True,
        # Prompts of different clips share only a few words, so a cache gains nothing.
        "enable_prefix_caching": False,
        "generation_config": "vllm",  # ignores the checkpoint's file, as each request states all settings
    }


class VllmEngine(Protocol):
    """Generates from prompt embeddings."""

    def generate(self, prompts: Sequence[Tensor], sampling: dict[str, Any]) -> list[list[int]]:
        """Returns the generated ids for each prompt (S, Dl), in order."""


def sampling_arguments(settings: GenerationSettings, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Returns arguments of `vllm.SamplingParams` that are equivalent to these settings in transformers.

    Raises:
        UserError: vLLM does not support a setting, or not for prompt embeddings.
    """
    rules = settings.rules
    if rules.num_beams > 1:
        beams = rules.num_beams
        raise UserError(
            f"evaluation.num_beams={beams} is not supported by {_ENGINE}; set it to 1, or evaluation.engine=native"
        )
    if rules.no_repeat_ngram_size:
        size = rules.no_repeat_ngram_size
        raise UserError(
            f"evaluation.no_repeat_ngram_size={size} is not supported by {_ENGINE}; set it to 0, or "
            "evaluation.engine=native"
        )
    if rules.repetition_penalty != 1.0:
        # vLLM applies it to the ids of the prompt too, but prompt embeddings have none:
        # https://github.com/vllm-project/vllm/issues/57719.
        penalty = rules.repetition_penalty
        raise UserError(
            f"evaluation.repetition_penalty={penalty} makes vLLM fail for prompt embeddings (vLLM issue 57719); "
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
    """Raises a `UserError` unless vLLM is installed here or in the environment of `python`."""
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"{_ENGINE} needs vLLM, which is not installed here; install it in an environment of its own "
                "(python -m venv vllm-env && vllm-env/bin/pip install vllm) and set "
                "evaluation.vllm_python=vllm-env/bin/python"
            )
        return
    try:
        # Importing vLLM takes up to minutes on a cold disk.
        done = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"evaluation.vllm_python={python} cannot be run ({type(error).__name__}); set it to a Python interpreter"
        ) from error
    if done.returncode != 0:
        reason = next(iter(reversed(done.stderr.strip().splitlines())), "no message")
        raise UserError(
            f"evaluation.vllm_python={python} cannot import vllm ({reason}); install it there with `pip install vllm`"
        )


def start_engine(arguments: dict[str, Any], python: str | None) -> VllmEngine:
    """Starts vLLM in this process or in its own environment.

    Args:
        arguments: Arguments from `engine_arguments`.
        python: Interpreter of an environment with vLLM; None for this process.

    Raises:
        UserError: vLLM does not start.
    """
    if python is not None:
        return VllmSubprocess(arguments, python)
    try:
        return InProcessVllm(vllm_worker.start(arguments))
    except Exception as error:  # vLLM raises many types, most of them for too little GPU memory
        raise _not_started(f"{type(error).__name__}: {first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class InProcessVllm:
    """vLLM in this process.

    Attributes:
        llm: Instance of `vllm.LLM`.
    """

    llm: Any

    def generate(self, prompts: Sequence[Tensor], sampling: dict[str, Any]) -> list[list[int]]:
        """Returns the generated ids for each prompt (S, Dl), in order."""
        return vllm_worker.generate(self.llm, [prompt.cpu() for prompt in prompts], sampling)


class VllmSubprocess:
    """vLLM in a subprocess with its own environment, as it requires other versions of torch and transformers.

    Args:
        arguments: Arguments from `engine_arguments`.
        python: Interpreter of that environment.

    Raises:
        UserError: vLLM does not start.
    """

    def __init__(self, arguments: dict[str, Any], python: str) -> None:
        # -P keeps the folder of worker.py off sys.path, where vLLM would import modules of this package.
        command = [python, "-P", str(Path(vllm_worker.__file__))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        # Also called when the object is collected, and at the end of the program.
        self.close = weakref.finalize(self, _stop, self._process)
        answer = self._request({"engine": arguments})
        if "error" in answer:
            self.close()
            raise _not_started(answer["error"])

    def generate(self, prompts: Sequence[Tensor], sampling: dict[str, Any]) -> list[list[int]]:
        """Returns the generated ids for each prompt (S, Dl), in order."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(prefix="vlmcap-vllm-") as folder:
            file = Path(folder) / "prompts.safetensors"
            # Embeddings go through a file, as JSON would multiply their size; the pipe has only requests and answers.
            save_file({str(index): prompt.cpu().contiguous() for index, prompt in enumerate(prompts)}, file)
            answer = self._request({"file": str(file), "count": len(prompts), "sampling": sampling})
        if "error" in answer:
            raise UserError(
                f"vLLM could not caption a batch ({answer['error']}); see its output above, or set "
                "evaluation.engine=native"
            )
        ids: list[list[int]] = answer["ids"]
        return ids

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        # End of file: the process has ended.
        if not line:
            return {"error": f"its process ended with exit code {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _stop(process: subprocess.Popen[str]) -> None:
    """Stops vLLM's process by closing its input."""
    assert process.stdin is not None
    assert process.stdout is not None
    # Closing writes what is buffered, which fails if the process is gone.
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
        f"vLLM did not start ({reason}); lower evaluation.vllm_gpu_memory if GPU memory is too small, or set "
        "evaluation.engine=native"
    )
