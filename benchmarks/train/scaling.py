"""Time and memory of this project's cached training step against frames, caption tokens, batch and width.

    python benchmarks/train/scaling.py [--steps 3] [--threads 2]

One size varies at a time around a base of 4 frames, 225 caption tokens, one clip and a language model of width 512 (4
layers, vocabulary 151 936). Each point is a separate process, as in step.py: median wall and processor seconds of a
step after a warm-up, operations of one forward and backward pass, largest resident set of the process, and how much of
it was there before the first step (libraries, weights, and what loading takes). Writes scaling.json, and scaling.png
where matplotlib is installed. `--axes` without names plots what scaling.json holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from parts import Shape, attention_flops
from step import WARM_UP, hear, machine, start, tell

BASE: dict[str, Any] = {"num_frames": 4, "captions": [225], "text_width": 512}
AXES: dict[str, dict[int, dict[str, Any]]] = {
    "frames": {count: {"num_frames": count} for count in (2, 4, 8, 16)},
    "caption tokens": {count: {"captions": [count]} for count in (112, 225, 450, 900)},
    "clips a batch": {count: {"captions": [225] * count} for count in (1, 2, 4)},
    "width of the language model": {width: {"text_width": width} for width in (256, 512, 1024)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", nargs="*", default=list(AXES), help="the others in the file stay as they are")
    parser.add_argument("--steps", type=int, default=3, help="after the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    path = arguments.output / "scaling.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"axes": {}}
    for axis in arguments.axes:
        points = {
            str(size): measure(BASE | change, arguments.steps, arguments.threads) for size, change in AXES[axis].items()
        }
        result |= {"machine": machine(), "base": BASE, "threads": arguments.threads}
        result["axes"][axis] = points
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report(result)
    if importlib.util.find_spec("matplotlib"):
        plot(result, arguments.output / "scaling.png")
    else:
        print("\nmatplotlib is not installed: no plot")


def measure(shape: dict[str, Any], num_steps: int, threads: int) -> dict[str, Any]:
    """Measures one point."""
    name = json.dumps(shape)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        saving = start([name, folder, "save", "0"], threads)
        saving.communicate()
        assert saving.returncode == 0
        process = start([name, folder, "cached", str(num_steps + WARM_UP)], threads)
        loaded, steps = hear(process), []
        for _ in range(num_steps + WARM_UP):
            tell(process)
            steps.append(hear(process))
        end = hear(process)
        process.communicate()
    wall, cpu = ([round(step[key], 3) for step in steps[WARM_UP:]] for key in ("wall_s", "cpu_s"))
    point = {"wall_s": wall, "cpu_s": cpu, "median_s": statistics.median(wall), "median_cpu_s": statistics.median(cpu)}
    sizes = Shape(**shape | {"captions": tuple(shape["captions"])})
    end["flops"] += attention_flops(sizes, "cached")
    point |= {"loaded_gib": loaded["peak_gib"], **end}
    print(f"{name}: {point}", file=sys.stderr, flush=True)
    return point


def report(result: dict[str, Any]) -> None:
    print(
        "| axis | size | s per step, median (least to most) | processor s | TFLOP | peak GiB | before the first step |"
    )
    print("|---|---|---|---|---|---|---|")
    for axis, points in result["axes"].items():
        for size, point in points.items():
            spread = f"{point['median_s']:.2f} ({min(point['wall_s']):.2f} to {max(point['wall_s']):.2f})"
            compute = f"{point['median_cpu_s']:.2f} | {point['flops'] / 1e12:.3f}"
            memory = f"{point['peak_gib']:.2f} | {point['loaded_gib']:.2f}"
            print(f"| {axis} | {size} | {spread} | {compute} | {memory} |")


def plot(result: dict[str, Any], path: Path) -> None:
    """Plots two rows of panels, time and memory, with a column per axis."""
    from matplotlib.figure import Figure

    axes = result["axes"]
    figure = Figure(figsize=(3.4 * len(axes), 6), layout="constrained")
    panels = figure.subplots(2, len(axes), sharey="row", squeeze=False)
    for column, (axis, points) in enumerate(axes.items()):
        sizes = [int(size) for size in points]
        rows = list(points.values())
        time, memory = panels[0][column], panels[1][column]
        time.plot(sizes, [row["median_cpu_s"] for row in rows], "o-", color="tab:blue", label="processor seconds")
        speed = min(row["median_cpu_s"] / row["flops"] for point in axes.values() for row in point.values())
        time.plot(
            sizes,
            [speed * row["flops"] for row in rows],
            ":",
            color="tab:gray",
            label="arithmetic at the best rate seen",
        )
        memory.plot(sizes, [row["peak_gib"] for row in rows], "o-", color="tab:orange", label="peak")
        memory.plot(sizes, [row["loaded_gib"] for row in rows], ":", color="tab:gray", label="before the first step")
        for panel in (time, memory):
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.grid(alpha=0.3)
        memory.set_xlabel(axis)
    panels[0][0].set_ylabel("seconds a step")
    panels[1][0].set_ylabel("resident set, GiB")
    for row in panels:
        row[0].set_ylim(0, 1.1 * row[0].get_ylim()[1])  # shared, so it is known only now
        row[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
