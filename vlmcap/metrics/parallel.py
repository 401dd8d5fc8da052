"""Tokenising many captions in several processes.

The workers are plain `python -m vlmcap.metrics.worker NAME` processes that speak JSON over their pipes. multiprocessing would either
fork a process that holds threads and a CUDA context, or import the caller's main script once more in every worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

# Below this number of characters a worker's start takes longer than the tokens do.
_CHARACTERS_PER_WORKER = 1_000_000
_MOST_WORKERS = 8


def worker_count(texts: Sequence[str]) -> int:
    """The processes worth starting for these texts: 1 below two million characters, at most 8 and the processors of this process."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(sum(map(len, texts)) // _CHARACTERS_PER_WORKER, processors, _MOST_WORKERS))


def tokenize_in_processes(name: str, fold_width: bool, texts: Sequence[str], workers: int) -> list[list[str]]:
    """The tokens of each text, in order, by `workers` processes with the tokeniser of that name.

    Args:
        name: One of `TOKENIZER_NAMES`.
        fold_width: As in `get_tokenizer`.
        texts: The texts, at least one.
        workers: Processes, at least 1.

    Returns:
        What one process would return.

    Raises:
        RuntimeError: A worker stopped; what it said stands in the message.
    """
    size = -(-len(texts) // workers)
    chunks = [list(texts[start : start + size]) for start in range(0, len(texts), size)]
    with ThreadPoolExecutor(len(chunks)) as pool:
        parts = pool.map(lambda chunk: _run_worker(name, fold_width, chunk), chunks)
        return [tokens for part in parts for tokens in part]


def _run_worker(name: str, fold_width: bool, texts: list[str]) -> list[list[str]]:
    # The worker must find the same packages, also where the caller changed its path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", "vlmcap.metrics.worker", name]
    request = json.dumps([fold_width, texts]).encode()
    done = subprocess.run(command, input=request, capture_output=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"A tokeniser process stopped: {done.stderr.decode(errors='replace').strip()[-500:]}")
    tokens: list[list[str]] = json.loads(done.stdout)
    return tokens
