"""Trains the demo from nothing for several seeds and prints every fact's accuracy, with own and exchanged videos.

python experiments/demo/seeds.py                          five seeds, one after another: half an hour on two cores
python experiments/demo/seeds.py --seeds 3 projector=mlp  one seed, with settings of `python train.py`

Each seed draws other clips, other tiny components and another training run, and starts from an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FACTS = ("place", "time", "weather", "object", "colour", "direction", "camera", "mean")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo for each seed and prints the table."""
    parser = argparse.ArgumentParser(description="Train the demo from an empty cache for several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo_seeds"), help="folder of the runs")
    parser.add_argument(
        "--again", action="store_true", help="train each seed a second time, with its clips and components there"
    )
    options, overrides = parser.parse_known_args(arguments)
    runs = {
        seed: run_demo(seed, options.output.resolve(), overrides, is_repeated=options.again) for seed in options.seeds
    }
    print("\n".join(table(runs)))


def run_demo(seed: int, output: Path, overrides: Sequence[str], *, is_repeated: bool) -> dict[str, Any]:
    """Trains one seed in a cache of its own, and returns the scores and the seconds of its whole processes."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2 if is_repeated else 1):
            folder = output / f"seed_{seed}" / str(len(seconds))
            command = [
                sys.executable,
                "train.py",
                f"seed={seed}",
                f"data.demo.seed={seed}",
                f"paths.output_dir={folder}",
            ]
            started = time.perf_counter()
            subprocess.run([*command, *overrides], cwd=ROOT, check=True, env=os.environ | {"VLMCAP_CACHE_DIR": cache})
            seconds.append(time.perf_counter() - started)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {"scores": summary["scores"], "seconds": seconds}


def table(runs: dict[int, dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: per seed the accuracy with own videos, with exchanged ones, and by chance."""
    lines = ["| seed | videos | " + " | ".join(FACTS) + " | minutes |", "| --- | --- |" + " ---: |" * (len(FACTS) + 1)]
    rows = {"own": "test/facts/", "exchanged": "test/swapped/facts/", "chance": "test/permuted/facts/"}
    for seed, run in runs.items():
        minutes = ", ".join(f"{seconds / 60:.1f}" for seconds in run["seconds"])
        for name, prefix in rows.items():
            values = [f"{run['scores'][prefix + fact]:.3f}" for fact in FACTS]
            lines.append(f"| {seed} | {name} | {' | '.join(values)} | {minutes if name == 'own' else ''} |")
    lowest = [f"{min(run['scores'][rows['own'] + fact] for run in runs.values()):.3f}" for fact in FACTS]
    return [*lines, f"| lowest | own | {' | '.join(lowest)} | |"]


if __name__ == "__main__":
    main()
