"""Time and memory of BLEU, CIDEr, CIDEr-D and ROUGE-L: vlmcap against pycocoevalcap, on one core, in one run.

    python benchmarks/metrics/speed.py [--pairs 40000] [--tokens 108] [--repeats 2] [--stream 1000000]

Each runs alone in a separate process, and builds the same seeded corpus of Korean-looking words (frequencies as 1 /
rank; a prediction keeps 70 % of its reference). pycocoevalcap's Bleu, Cider and Rouge get the tokens joined by spaces,
as they require; vlmcap gets lists of tokens. Times are processor seconds, the least of the repeats, from tokens to
scores, including the counting of references; a later epoch counts only the predictions. "memory" is the peak above what
the corpus and the imports took, "whole" is that of the process.

Raw text: `score_captions` with mecab-ko in wall seconds, tokenising in as many processes as there are cores, first and
second epoch.
Streaming: many short predictions from a generator against counted references: the memory after counting and what it
grows by.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

from jobs import JOBS  # noqa: E402  beside this file; after the threads are set


def main() -> None:
    arguments = parse()
    if arguments.job:
        print(json.dumps(JOBS[arguments.job](arguments)))
        return
    rows = {job: run(job, arguments) for job in ("vlmcap", "pycocoevalcap", "raw text", "streaming")}
    result = {"machine": machine(), "pairs": arguments.pairs, "tokens": arguments.tokens, "results": rows}
    report(result)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result, arguments.output / "speed.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--tokens", type=int, default=108)
    parser.add_argument(
        "--repeats", type=int, default=2, help="of vlmcap; pycocoevalcap runs once from 10 000 pairs on"
    )
    parser.add_argument("--stream", type=int, default=1_000_000, help="pairs of ten tokens in the streaming case")
    parser.add_argument("--raw", type=int, default=20_000, help="pairs of 650 characters in the raw text case")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(job: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one job, measured in a separate process."""
    options = [f"--{key}={getattr(arguments, key)}" for key in ("pairs", "tokens", "repeats", "stream", "raw")]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, __file__, f"--job={job}", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{job} stopped:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("numpy", "pycocoevalcap", "mecab-ko")}
    try:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0]
    except (OSError, IndexError):
        processor = platform.processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load": load,
        "python": platform.python_version(),
        **packages,
    }


def report(result: dict[str, Any]) -> None:
    ours, theirs = result["results"]["vlmcap"], result["results"]["pycocoevalcap"]
    raw, stream = result["results"]["raw text"], result["results"]["streaming"]
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"{result['pairs']} pairs of about {result['tokens']} tokens\n")
    print(f"{'':22}{'first s':>10}{'later s':>10}{'memory MB':>12}{'whole MB':>10}")
    print(
        f"{'pycocoevalcap':22}{theirs['first_s']:10.1f}{theirs['first_s']:10.1f}{theirs['memory_mb']:12.0f}{theirs['whole_mb']:10.0f}"
    )
    print(
        f"{'vlmcap':22}{ours['first_s']:10.2f}{ours['later_s']:10.2f}{ours['memory_mb']:12.0f}{ours['whole_mb']:10.0f}"
    )
    ratios = [theirs["first_s"] / ours["first_s"], theirs["first_s"] / ours["later_s"]]
    sizes = [theirs["memory_mb"] / ours["memory_mb"], theirs["whole_mb"] / ours["whole_mb"]]
    print(f"{'times better':22}{ratios[0]:10.1f}{ratios[1]:10.1f}{sizes[0]:12.1f}{sizes[1]:10.1f}")
    print(
        "pycocoevalcap by scorer: "
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in theirs["seconds"].items())
    )
    off = max(abs(ours["scores"][name] - score) for name, score in theirs["scores"].items())
    print(f"largest difference of the scores: {off:.1e}\n")
    print(
        f"raw text, {raw['pairs']} pairs, {raw['cores']} cores: first epoch {raw['first_s']:.1f} s, second "
        f"{raw['later_s']:.1f} s (wall); "
        f"tokenising both sides {raw['tokenize_one_process_s']:.1f} s in one process, "
        f"{raw['tokenize_all_cores_s']:.1f} s on all cores"
    )
    print(
        f"streaming, {stream['pairs']} pairs of 10 tokens: references {stream['count_s']:.1f} s and "
        f"{stream['references_mb']:.0f} MB, "
        f"predictions {stream['score_s']:.1f} s and {stream['growth_mb']:.0f} MB more, "
        f"of which statistics {stream['statistics_mb']:.0f} MB; peak {stream['whole_mb']:.0f} MB"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return
    ours, theirs = result["results"]["vlmcap"], result["results"]["pycocoevalcap"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    axes[0].barh(["vlmcap, later", "vlmcap", "pycocoevalcap"], [ours["later_s"], ours["first_s"], theirs["first_s"]])
    axes[0].set(xlabel="processor seconds", xscale="log")
    axes[1].barh(["vlmcap", "pycocoevalcap"], [ours["whole_mb"], theirs["whole_mb"]])
    axes[1].set(xlabel="peak memory, MB")
    figure.suptitle(f"BLEU + CIDEr + CIDEr-D + ROUGE-L, {result['pairs']} pairs of {result['tokens']} tokens, one core")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
