"""Padding, planning time and memory of ways to batch: vlmcap beside transformers' length-grouped sampler.

    python benchmarks/data/batching.py [--clips 10000] [--batch-size 8] [--many 1000000] [--output
    benchmarks/data/batching.json]

Three data sets of drawn lengths, in tokens of a whole sequence: "long" has captions as those of AI Hub's background
videos (311 to 708 tokens of Qwen's tokenizer, 402 on average), a prompt of 40 and 128 visual tokens; "video" the same
with 1 152 visual tokens; "mixed" is half of "long" and half of images with 144 visual tokens and captions of 10 to 60.
The budget is the batch size times the mean length, so that all ways have about as many tokens per batch. `padding` is
the share of padding among the tokens computed, `fill` the share of the budget that is used by tokens, `largest` the
most tokens of a batch over the budget: memory is sized by it. One epoch each.

transformers' sampler orders clips by length within 50 batches drawn at random; its batches are slices of that order.

The plans of many clips are made in separate processes, for packed and for length-grouped batches: seconds to the plan
and to the first batch of an epoch, and growth of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmcap.data.loading.batches import BatchPlan, BatchSampler, length_plan, packed_plan, shuffled_plan

Lengths = NDArray[np.int64]
Batches = list[list[int]]

PROMPT = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(plan_cost(arguments.job, arguments.many)))
        return
    result: dict[str, Any] = {"machine": machine(), "clips": arguments.clips, "batch_size": arguments.batch_size}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    result["padding"] = {name: measure(name, arguments.clips, arguments.batch_size) for name in DATA_SETS}
    print(f"\nplans of {arguments.many} clips\n{'':34}{'plan s':>10}{'first s':>10}{'bytes a clip':>14}{'peak':>8}")
    result["plans"] = {"clips": arguments.many}
    for job in PLANS:
        command = [sys.executable, __file__, f"--job={job}", f"--many={arguments.many}"]
        cost = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        result["plans"][job] = cost
        print(
            f"{job:34}{cost['plan_s']:10.2f}{cost['first_batch_s']:10.2f}{cost['held_bytes']:14.0f}{cost['peak_bytes']:8.0f}"
        )
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def long_captions(count: int, visual: int = 128) -> Lengths:
    captions = np.random.default_rng(0).gamma(16, 6, count) + 306
    return np.clip(captions, 311, 708).astype(np.int64) + PROMPT + visual


def mixed(count: int) -> Lengths:
    images = np.random.default_rng(1).integers(10, 61, count // 2) + PROMPT + 144
    return np.concatenate([long_captions(count - count // 2), images])


DATA_SETS: dict[str, Callable[[int], Lengths]] = {
    "long": long_captions,
    "video": lambda count: long_captions(count, 1152),
    "mixed": mixed,
}
PLANS: dict[str, Callable[[Lengths, int, int], BatchPlan]] = {
    "shuffled": lambda lengths, size, budget: shuffled_plan(len(lengths), size),
    "by_length": lambda lengths, size, budget: length_plan(lengths, batch_size=size),
    "by_length, max_tokens_per_batch": lambda lengths, size, budget: length_plan(lengths, max_tokens=budget),
    "packed": lambda lengths, size, budget: packed_plan(lengths, budget),
}


def measure(name: str, count: int, size: int) -> dict[str, Any]:
    lengths = DATA_SETS[name](count)
    budget = max(int(lengths.mean() * size), int(lengths.max()))
    print(f"\n{name}: {lengths.mean():.0f} tokens ({lengths.min()} to {lengths.max()}), budget {budget}")
    print(f"{'':34}{'batches':>10}{'padding':>10}{'fill':>10}{'largest':>10}")
    ways: dict[str, Batches] = {"transformers, group_by_length": peer_batches(lengths, size)}
    for plan_name, plan in PLANS.items():
        ways[plan_name] = [[index for _, index in batch] for batch in BatchSampler(plan(lengths, size, budget))]
    rows = {}
    for way, batches in ways.items():
        computed = [
            int(lengths[batch].sum() if way == "packed" else lengths[batch].max() * len(batch)) for batch in batches
        ]
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        rows[way] = {
            "batches": len(batches),
            "padding": 1 - lengths.sum() / sum(computed),
            "fill": lengths.sum() / (budget * len(batches)),
            "largest": max(computed) / budget,
        }
        print(
            f"{way:34}{len(batches):10}{rows[way]['padding']:10.2%}{rows[way]['fill']:10.1%}{rows[way]['largest']:10.2f}"
        )
    return {"budget": budget, **rows}


def peer_batches(lengths: Lengths, size: int) -> Batches:
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    order = list(LengthGroupedSampler(size, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(0)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def plan_cost(name: str, count: int) -> dict[str, float]:
    lengths = long_captions(count)
    before, start = resident(), time.perf_counter()
    sampler = BatchSampler(PLANS[name](lengths, 8, 4096))
    planned = time.perf_counter()
    batches = iter(sampler)
    next(batches)
    first = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "plan_s": planned - start,
        "first_batch_s": first - planned,
        "held_bytes": (resident() - before) / count,
        "peak_bytes": (peak - before) / count,
    }


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = {name: version(name) for name in ("numpy", "torch", "transformers")}
    return {"processor": names[0], "cores": os.cpu_count(), "python": platform.python_version(), **packages}


if __name__ == "__main__":
    main()
