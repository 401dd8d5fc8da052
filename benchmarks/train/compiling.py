"""Speed of `torch.compile`: the cached training step with and without compiled language model layers.

    python benchmarks/train/compiling.py [--steps 5] [--lengths 450 380 520 410]

The shape is `small` of parts.py. Each layer is compiled separately, as `hardware.compile=true` does. "fixed" gives each
step the same caption length, "varying" gives each step another, as real captions have. Both models take each step one
after the other, from the same weights; the losses must agree. "first" is the step that compiles. Writes compiling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from parts import SHAPES, make_batch, make_ours, save_model
from safetensors.torch import load_file
from step import machine
from torch import Tensor

from vlmcap.models.llm.layers import compile_layers
from vlmcap.types import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="after the first")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[450, 380, 520, 410], help="of the captions that vary, in turn"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "machine": machine() | {"load_before": round(os.getloadavg()[0], 2)},
        "threads": arguments.threads,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(SHAPES["small"], folder)
        for kind, lengths in {"fixed": arguments.lengths[:1], "varying": arguments.lengths}.items():
            result[kind] = compare(folder, lengths, arguments.steps)
            (arguments.output / "compiling.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report(result)


def compare(folder: Path, lengths: list[int], num_steps: int) -> dict[str, Any]:
    torch._dynamo.reset()
    modules = {way: make_ours(folder, SHAPES["small"], is_cached=True, num_steps=1)[0] for way in ("plain", "compiled")}
    compile_layers(modules["compiled"].captioner.llm)
    features = load_file(folder / "features.st")["features"]
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in modules}
    for step in range(num_steps + 1):
        batch = make_batch(replace(SHAPES["small"], captions=(lengths[step % len(lengths)],)), features)
        for way, module in modules.items():
            rows[way].append(one_step(module, batch))
            print(step, way, rows[way][-1], file=sys.stderr, flush=True)
    difference = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(*rows.values(), strict=True))
    return {"lengths": lengths, "losses_differ_by": difference, "steps": rows}


def one_step(module: Any, batch: Batch) -> dict[str, float]:
    """Runs a forward and backward pass; weights do not change, so that both models start every step from the same."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss, labels = module.captioner(batch)
    mean: Tensor = loss / labels
    mean.backward()
    module.zero_grad()
    return {
        "loss": float(mean),
        "wall_s": round(time.perf_counter() - wall, 3),
        "cpu_s": round(time.process_time() - cpu, 3),
    }


def report(result: dict[str, Any]) -> None:
    print(
        "| captions | way | first step, s | s a step after it, median (least to most) | processor s | losses differ "
        "by |"
    )
    print("|---|---|---|---|---|---|")
    for kind in ("fixed", "varying"):
        for way, steps in result[kind]["steps"].items():
            wall = [step["wall_s"] for step in steps[1:]]
            spread = f"{statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f})"
            cpu = statistics.median(step["cpu_s"] for step in steps[1:])
            print(
                f"| {kind} | {way} | {steps[0]['wall_s']:.1f} | {spread} | {cpu:.2f} | "
                f"{result[kind]['losses_differ_by']:.0e} |"
            )


if __name__ == "__main__":
    main()
