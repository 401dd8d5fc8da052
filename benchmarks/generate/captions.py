"""Captions per second of transformers' generate and of vlmcap's native engine, in one run.

    python benchmarks/generate/captions.py [--clips 64] [--rows 16 32] [--repeats 3] [--threads 1] [--shrink 1]
    [--minutes M]

Qwen3 of 2 layers x 512 with random weights in float32 runs in full at every step, and generates captions with the
lengths of the data (scripted.py says how). Each engine gets the same input embeddings and must give the same ids back.
The methods:

transformers       `generate` on one batch of `rows` clips after another, left-padded, as vlmcap called it before
drop               vlmcap, the same batches one after another: rows that have ended leave
own                vlmcap, all clips at once: rows that have ended leave, waiting clips take their slots
own, known         the same, the longest captions first, as if their lengths were known
own, speculate N   the same as `own` with N-gram look-up, on captions without repetition
phrases, ...       `own` without and with look-up, on captions of 40 repeated phrases

Methods take turns, and the order is reversed every other time. Every time goes to captions.json; the command continues
where an earlier one with the same settings stopped, such as after `--minutes`. The plot needs matplotlib (`pip install
vlmcap[bench]`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

if "--threads" not in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from scripted import END, LEAST, MEAN, MOST, ScriptedQwen3, Task, make_model, make_task  # noqa: E402

from vlmcap.config import EvaluationConfig  # noqa: E402
from vlmcap.models.decoding.engine import greedy_ids  # noqa: E402
from vlmcap.models.decoding.settings import GenerationSettings  # noqa: E402

MAX_NEW = 768
METHODS = ("transformers", "drop", "own", "own, known", "own, speculate 3", "phrases, own", "phrases, speculate 3")
HF = METHODS[0]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    path = arguments.output / "captions.json"
    settings = {
        key: getattr(arguments, key) for key in ("clips", "prompt", "layers", "width", "threads", "seed", "shrink")
    }
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "times": {}}
    result["machine"] = machine()
    tasks = Tasks(arguments)
    started = time.monotonic()
    for repeat in range(arguments.repeats):
        for rows in arguments.rows:
            for method in arguments.methods[:: -1 if repeat % 2 else 1]:
                times = result["times"].setdefault(str(rows), {}).setdefault(method, [])
                if len(times) > repeat:
                    continue
                if time.monotonic() - started > 60 * arguments.minutes:
                    return print("Time is up; run the command again to go on.")
                times.append(tasks.measure(method, rows))
                print(f"rows {rows}, {method}: {times[-1]}", flush=True)
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lengths = tasks.lengths()
    result["lengths"] = {"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)}
    result["bound"] = {rows: bound(lengths, int(rows)) for rows in result["times"]}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result)
    plot(result, lengths, arguments.output / "captions.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--prompt", type=int, default=256, help="tokens before a caption, give or take an eighth")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--shrink", type=int, default=1, help="shorten prompts and captions by this factor, for a slow machine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing more after so long")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


class Tasks:
    """The model, and clips with captions that it will generate."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model: ScriptedQwen3 = make_model(arguments.clips, arguments.layers, arguments.width)
        greedy_ids(
            self.model, self.make().prompts[:4], GenerationSettings(32), [END], 4
        )  # the first calls of a process are slower

    def make(self, phrases: int | None = None) -> Task:
        given = self.arguments
        return make_task(
            self.model, given.clips, given.prompt // given.shrink, seed=given.seed, shrink=given.shrink, phrases=phrases
        )

    def lengths(self) -> list[int]:
        return [len(caption) for caption in self.make().captions]

    def measure(self, method: str, rows: int) -> dict[str, float]:
        """Returns the seconds of all clips' captions, which must be the scripted ones."""
        task = self.make(40 if method.startswith("phrases") else None)
        wall, processor = time.perf_counter(), time.process_time()
        captions = self.captions(task, method, rows)
        times = {
            "wall_s": round(time.perf_counter() - wall, 2),
            "processor_s": round(time.process_time() - processor, 2),
        }
        assert captions == task.captions, f"{method} writes other captions"
        return times

    def captions(self, task: Task, method: str, rows: int) -> list[list[int]]:
        starts = range(0, len(task.prompts), rows)
        settings = GenerationSettings(
            MAX_NEW, EvaluationConfig(speculate_ngram=int(method[-1]) if "speculate" in method else 0)
        )
        if method == HF:
            return [ids for start in starts for ids in by_transformers(self.model, task.prompts[start : start + rows])]
        if method == "drop":
            parts = [task.prompts[start : start + rows] for start in starts]
            return [ids for part in parts for ids in greedy_ids(self.model, part, settings, [END], rows)]
        order = list(range(len(task.prompts)))
        if method == "own, known":
            order.sort(key=lambda clip: -len(task.captions[clip]))
        ids = greedy_ids(self.model, [task.prompts[clip] for clip in order], settings, [END], rows)
        return [ids[order.index(clip)] for clip in range(len(order))]


@torch.no_grad()
def by_transformers(model: ScriptedQwen3, prompts: list[torch.Tensor]) -> list[list[int]]:
    """Generates captions up to and including their end token, of one left-padded batch."""
    embeddings = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], batch_first=True, padding_side="left"
    )
    ids = model.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        **GenerationSettings(MAX_NEW).as_arguments(),
        eos_token_id=END,
        pad_token_id=END,
    ).tolist()
    return [row[: row.index(END) + 1] for row in ids]


def bound(lengths: list[int], rows: int) -> float:
    """Returns the gain of refilling alone: tokens that plain batches have room for, over those that are generated."""
    room = sum(
        len(part) * max(part) for part in (lengths[start : start + rows] for start in range(0, len(lengths), rows))
    )
    return room / sum(lengths)


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = {name: version(name) for name in ("torch", "transformers")}
    load = round(os.getloadavg()[0], 1)
    return {
        "processor": names[0] if names else "",
        "cores": os.cpu_count(),
        "load": load,
        "python": platform.python_version(),
        **packages,
    }


def ratios(times: dict[str, Any], method: str, peer: str, kind: str) -> list[float]:
    """Returns for each repeat how many times faster it is than its peer."""
    return [theirs[kind] / ours[kind] for theirs, ours in zip(times.get(peer, []), times.get(method, []), strict=False)]


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(result: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    clips = result["settings"]["clips"]
    for rows, times in result["times"].items():
        print(f"\n{clips} clips by {rows} rows; refilling alone can give {result['bound'][rows]:.2f}\n")
        print(
            "| method | captions a second | times transformers, wall | processor seconds | times transformers, "
            "processor |"
        )
        print("|---|---|---|---|---|")
        for method, taken in times.items():
            peer = "phrases, own" if method.startswith("phrases") else HF
            cells = [spread([clips / each["wall_s"] for each in taken]), spread(ratios(times, method, peer, "wall_s"))]
            cells += [
                spread([each["processor_s"] for each in taken]),
                spread(ratios(times, method, peer, "processor_s")),
            ]
            print(f"| {method} | {' | '.join(cells)} |")


def plot(result: dict[str, Any], lengths: list[int], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    counts = [count for count in range(1, len(lengths) + 1) if len(lengths) % count == 0]
    axes.plot(counts, [bound(lengths, count) for count in counts], "k-", label="refilling alone, the lengths drawn")
    axes.axhline(MOST / MEAN, color="grey", ls=":", label=f"refilling alone, a caption of {MOST} tokens in every batch")
    axes.axhline(1.4, color="tab:red", ls="--", lw=1, label="target")
    for shift, (method, kind, mark) in enumerate(
        (m, k, s) for m, s in (("drop", "s"), ("own", "o")) for k in ("wall_s", "processor_s")
    ):
        found = {int(rows): ratios(times, method, HF, kind) for rows, times in result["times"].items()}
        middle = {rows: median(values) for rows, values in found.items() if values}
        if not middle:
            continue
        low = [middle[rows] - min(found[rows]) for rows in middle]
        high = [max(found[rows]) - middle[rows] for rows in middle]
        places = [rows + 0.6 * (shift - 1.5) for rows in middle]
        axes.errorbar(
            places,
            list(middle.values()),
            [low, high],
            fmt=mark,
            capsize=3,
            label=f"{method}, {kind.removesuffix('_s')} seconds",
        )
    axes.set(
        xlabel="rows",
        ylabel="times transformers' captions a second",
        title=f"Captions of {LEAST} to {MOST} tokens, mean {MEAN}",
    )
    axes.set_ylim(bottom=0.9)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
