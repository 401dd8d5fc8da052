"""Generates with vLLM from prompt embeddings, in this process or as a program in vLLM's own environment.

This file imports nothing from the package, because vLLM's environment has vLLM, torch and safetensors, but not vlmcap.
As a program, it reads one JSON object per line from standard input and answers each with one on standard output;
tensors are passed in safetensors files.

Source: https://docs.vllm.ai/en/stable/features/prompt_embeds/ (`LLM(enable_prompt_embeds=True)`, `{"prompt_embeds": (S,
Dl)}`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any


def start(arguments: dict[str, Any]) -> Any:
    """Starts vLLM for a folder in Hugging Face layout; the arguments are those of `vllm.LLM`."""
    from vllm import LLM

    return LLM(**arguments)


def generate(engine: Any, prompts: Sequence[Any], sampling: dict[str, Any]) -> list[list[int]]:
    """Returns the generated ids for each prompt, in order.

    Args:
        engine: Engine from `start`.
        prompts: Embeddings (S, Dl) of each prompt, without padding.
        sampling: Arguments of `vllm.SamplingParams`.
    """
    from vllm import SamplingParams

    outputs = engine.generate([{"prompt_embeds": rows} for rows in prompts], SamplingParams(**sampling), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    """Serves requests until standard input ends: first `{"engine": {…}}`, then `{"file", "count", "sampling"}`."""
    # Answers go to a copy of standard output; everything else that is printed goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM and its processes print to standard output, too
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "engine" in request:
                engine = start(request["engine"])
                answer: dict[str, Any] = {"ready": True}
            else:
                answer = {"ids": generate(engine, _read(request["file"], request["count"]), request["sampling"])}
        except Exception as error:  # the parent process reports it in one sentence
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0]}" if text else type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def _read(file: str, count: int) -> list[Any]:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return [tensors[str(index)] for index in range(count)]


if __name__ == "__main__":
    main()
