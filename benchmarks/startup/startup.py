"""Startup time of vlmcap: help, the resolved configuration, and the first training step of the demo.

    python benchmarks/startup/startup.py [--repeats 5] [--output benchmarks/startup]

Each command runs in a fresh process, the commands in turn and not one after another, so that a busy minute falls on all
of them. Processor seconds (user and system, of the process and its children) are the more reliable figure on a shared
machine; wall seconds go from the process's start to its end. The first step ends when Lightning calls the callbacks of
its first batch; clips, tiny parts and features of the demo are made before, unmeasured, in `paths.cache_dir`
($VLMCAP_CACHE_DIR), which takes three minutes where they are not there yet. `import` is what the libraries alone take
by Python's defaults; train.py imports them with the cyclic garbage collector off, which saves about a fifth.
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
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "import torch, lightning, transformers, peft"
# `python train.py` with a callback that ends the process after the first batch; nothing heavy is imported before
# train.py imports it.
FIRST_STEP = """
import os, runpy, sys
import vlmcap.training.run as run

build_run = run.build_run

def built(*arguments, **named):
    import lightning

    class Stop(lightning.Callback):
        def on_train_batch_end(self, *_):
            os._exit(0)

    made = build_run(*arguments, **named)
    made.trainer.callbacks.insert(0, Stop())
    return made

run.build_run = built
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
PACKAGES = ("torch", "lightning", "transformers", "peft", "hydra-core")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        first_step = ["-c", FIRST_STEP, f"paths.output_dir={folder}/run", f"hydra.run.dir={folder}/hydra"]
        run(first_step)  # makes what is missing
        commands = {
            "python train.py --help": ["train.py", "--help"],
            "python train.py --cfg job": ["train.py", "--cfg", "job"],
            "python evaluate.py --help": ["evaluate.py", "--help"],
            "vlmcap --help": ["-m", "vlmcap.cli", "--help"],
            "import torch, lightning, transformers, peft": ["-c", LIBRARIES],
            "python train.py, to the end of the first step": first_step,
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.repeats):
            for name, command in commands.items():
                times[name].append(run(command))
    result = {
        "machine": machine(),
        "repeats": arguments.repeats,
        "commands": {name: summary(pairs) for name, pairs in times.items()},
    }
    print(table(result["commands"]))
    (arguments.output / "startup.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def run(command: list[str]) -> tuple[float, float]:
    """Returns processor and wall seconds of a fresh interpreter."""
    started, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, time.perf_counter() - started


def summary(pairs: list[tuple[float, float]]) -> dict[str, float | list[float]]:
    processor, wall = ([round(value, 3) for value in values] for values in zip(*pairs, strict=True))
    return {
        "processor_s": statistics.median(processor),
        "wall_s": statistics.median(wall),
        "each_processor_s": processor,
        "each_wall_s": wall,
    }


def table(commands: dict[str, dict[str, float | list[float]]]) -> str:
    lines = ["| command | processor seconds, median | wall seconds, median |", "|---|---:|---:|"]
    lines += [f"| `{name}` | {row['processor_s']:.2f} | {row['wall_s']:.2f} |" for name, row in commands.items()]
    return "\n".join(lines)


def machine() -> dict[str, object]:
    versions = {name: version(name) for name in PACKAGES}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpus": os.cpu_count(), "load": load, "python": platform.python_version(), "versions": versions}


if __name__ == "__main__":
    main()
