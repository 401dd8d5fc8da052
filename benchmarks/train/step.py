"""A training step of LLaVA-NeXT-Video with the Hugging Face Trainer, and with this project, uncached and cached.

    python benchmarks/train/step.py [--shapes small wide batch] [--steps 5] [--threads 2]

All three start from the same weights, adapters (peft's LoRA, rank 16, on all linear layers of the language model) and
clips, train the same parameters (adapters and projector) in float32 with the same AdamW, clipping and constant rates,
without gradient checkpointing and with PyTorch's fused attention, each in a separate process. "trainer" is
`LlavaNextVideoForConditionalGeneration` with its own loss in `transformers.Trainer`; "uncached" is this project's
module in Lightning's Trainer, on frames; "cached" is the same on features of the frozen encoder as the feature store
returns them, so that the encoder is not loaded (kept in float32 here, so that losses can be compared; reading them is
in benchmarks/cache). The processes take turns, step by step, so that a busy machine is busy for all, and their threads
wait without spinning, which costs the others' cores. A step is forward, backward, clipping and optimiser, and what the
trainers do around them; the first is a warm-up. Memory is the largest resident set of the process (ru_maxrss),
including libraries and weights. "bound" is the ratio of the floating-point operations of one forward and backward pass,
matrix products as PyTorch counts them and attention by its formula: the ratio of times if only arithmetic counted.
`--report` prints the contents of step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parts import SHAPES, Shape, attention_flops, num_tokens

WAYS = ("trainer", "uncached", "cached")
TARGETS = {"time": 0.35, "memory": 0.5, "losses": 1e-5}  # of cached to trainer; relative difference of losses
WARM_UP = 1
PACKAGES = ("torch", "transformers", "peft", "accelerate", "lightning")


def main() -> None:
    arguments = parse()
    path = arguments.output / "step.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in [] if arguments.report else arguments.shapes:
        result[name] = measure(name, arguments.steps, arguments.threads)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, found in result.items():
        report(name, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", default=["small", "wide", "batch"], help="the others in the file stay as they are"
    )
    parser.add_argument("--steps", type=int, default=5, help="after the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def measure(name: str, num_steps: int, threads: int) -> dict[str, Any]:
    shape, load_before = SHAPES[name], os.getloadavg()[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run_alone(name, folder, threads)
        rows = take_turns(
            {way: [name, folder, way, str(num_steps + WARM_UP)] for way in WAYS}, num_steps + WARM_UP, threads
        )
    tokens = sum(num_tokens(shape))
    return {
        "shape": asdict(shape),
        "tokens": tokens,
        "threads": threads,
        "machine": machine() | {"load_before": round(load_before, 2)},
        "ways": {way: summarise(row, tokens) for way, row in rows.items()},
    }


def start(arguments: list[str], threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("ways.py")), *arguments]
    quiet = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | quiet | {"PYTHONPATH": path}, **pipes)


def run_alone(name: str, folder: str, threads: int) -> None:
    """Makes the weights."""
    process = start([name, folder, "save", "0"], threads)
    process.communicate()
    assert process.returncode == 0


def take_turns(jobs: dict[str, list[str]], num_steps: int, threads: int) -> dict[str, dict[str, Any]]:
    """Returns what each way reports of loading, of each step and of its end."""
    processes = {way: start(arguments, threads) for way, arguments in jobs.items()}
    rows = {way: {"loaded": hear(process), "steps": []} for way, process in processes.items()}
    for step in range(num_steps):
        for way, process in processes.items():
            tell(process)
            rows[way]["steps"].append(hear(process))
            print(f"step {step}, {way}: {rows[way]['steps'][-1]}", file=sys.stderr, flush=True)
    for way, process in processes.items():
        rows[way]["end"] = hear(process)
        process.communicate()
    return rows


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    content: dict[str, Any] = json.loads(process.stdout.readline())
    return content


def summarise(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    steps = row["steps"][WARM_UP:]
    wall, cpu = ([round(step[key], 3) for step in steps] for key in ("wall_s", "cpu_s"))
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "median_s": statistics.median(wall),
        "median_cpu_s": statistics.median(cpu),
        "tokens_per_s": round(tokens / statistics.median(wall), 1),
        "losses": [step["loss"] for step in row["steps"]],
        **{f"loaded_{key}": value for key, value in row["loaded"].items()},
        **row["end"],  # peak_gib; flops of matrix products
    }


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: version(name) for name in PACKAGES}
    return {"processor": processor, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)} | versions


def report(name: str, result: dict[str, Any]) -> None:
    """Prints the table of a shape, and whether the targets are met."""
    ways, base, load = result["ways"], result["ways"]["trainer"], result["machine"]
    shape = Shape(**result["shape"] | {"captions": tuple(result["shape"]["captions"])})
    flops = {way: row["flops"] + attention_flops(shape, way) for way, row in ways.items()}
    print(
        f"\n**{name}**: {result['tokens']} tokens per step, load {load['load_before']} before, {load['load']} after\n"
    )
    titles = (
        "way | s per step, median (least to most) | ratio | processor s | ratio | bound | tokens/s | peak GiB | ratio"
    )
    print(f"| {titles} | losses differ by |\n{'|---' * 10}|")
    for way, row in ways.items():
        spread = f"{row['median_s']:.2f} ({min(row['wall_s']):.2f} to {max(row['wall_s']):.2f})"
        time, processor, memory = (row[key] / base[key] for key in ("median_s", "median_cpu_s", "peak_gib"))
        cells = [
            way,
            spread,
            f"{time:.2f}",
            f"{row['median_cpu_s']:.2f}",
            f"{processor:.2f}",
            f"{flops[way] / flops['trainer']:.2f}",
        ]
        cells += [
            f"{row['tokens_per_s']:.0f}",
            f"{row['peak_gib']:.2f}",
            f"{memory:.2f}",
            f"{difference(row, base):.0e}",
        ]
        print("| " + " | ".join(cells) + " |")
    cached = ways["cached"]
    found = {
        "time": cached["median_s"] / base["median_s"],
        "memory": cached["peak_gib"] / base["peak_gib"],
        "losses": max(difference(row, base) for row in ways.values()),
    }
    missed = [f"{key} {value:.2g} (target {TARGETS[key]})" for key, value in found.items() if value > TARGETS[key]]
    print(f"\nMISSED: {', '.join(missed)}" if missed else "\nmet")


def difference(row: dict[str, Any], base: dict[str, Any]) -> float:
    """Returns the largest relative difference of the losses of all steps."""
    return max(abs(loss - other) / other for loss, other in zip(row["losses"], base["losses"], strict=True))


if __name__ == "__main__":
    main()
