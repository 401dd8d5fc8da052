"""Memory of a long manifest: a Python list of clips against `ClipTable`, in the main process and in data workers.

    python benchmarks/data/manifest_memory.py [--clips 1000000] [--characters 575] [--workers 4] [--output F.json]

Both are filled by the same reader from the same file of JSON lines, each in a separate process. Then workers are
started, by fork and by spawn, each reads every clip once, and all are measured while all are alive. RSS counts shared
pages in full, PSS (Linux) divides them among the processes that share them, so that the sum of PSS is the memory in
use. "anonymous" memory cannot be dropped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vlmcap.config import JsonlConfig
from vlmcap.data.formats import Record, read_records
from vlmcap.data.manifest import write_table
from vlmcap.types import Clip

SENTENCE = "파도가 밀려오는 바닷가에 해가 지고 갈매기 몇 마리가 낮게 날아간다. "
NUM_VIDEOS = 1000
MIB = 2**20


def main() -> None:
    arguments = parse()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind, arguments.method, arguments.folder, arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_manifest(Path(name), arguments.clips, arguments.characters)
        rows = []
        for kind in ("list", "table"):
            for method in ("fork", "spawn"):
                options = ["--kind", kind, "--method", method, "--folder", name, "--workers", str(arguments.workers)]
                done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
    result = {
        "clips": arguments.clips,
        "characters_a_caption": arguments.characters,
        "file_mib": round(size / MIB),
        "workers": arguments.workers,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory_mib} MiB",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "rows": rows,
    }
    show(result)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--characters", type=int, default=575, help="of a caption")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kind", choices=["list", "table"], help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=["fork", "spawn"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_manifest(folder: Path, clips: int, characters: int) -> int:
    """Writes a file of JSON lines and returns its bytes.

    Empty videos beside it make the reader's check of each realistic.
    """
    (folder / "videos").mkdir()
    for index in range(NUM_VIDEOS):
        (folder / "videos" / f"{index}.mp4").touch()
    text = SENTENCE * (characters // len(SENTENCE) + 2)
    with (folder / "all.jsonl").open("w", encoding="utf-8") as file:
        for index in range(clips):
            start = index % len(SENTENCE)
            entry = {
                "id": f"clip{index:07d}",
                "video": f"videos/{index % NUM_VIDEOS}.mp4",
                "caption": text[start : start + characters],
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return (folder / "all.jsonl").stat().st_size


def read_clips(folder: Path) -> Iterator[Clip]:
    for entry in read_records(JsonlConfig(root=str(folder), annotations="all.jsonl")):
        assert isinstance(entry, Record), entry
        yield entry.clip


def measure(kind: str, method: str, folder: Path, num_workers: int) -> dict[str, Any]:
    """Measures one kind of manifest in the main process and in workers that read all of it."""
    before = memory()
    started = time.perf_counter()
    clips: Sequence[Clip] = (
        list(read_clips(folder)) if kind == "list" else write_table(read_clips(folder), folder / f"tables-{method}")
    )
    build_s = time.perf_counter() - started
    built, peak = memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    context = multiprocessing.get_context(method)
    barrier, results = context.Barrier(num_workers + 1), context.SimpleQueue()
    started = time.perf_counter()
    processes = [context.Process(target=work, args=(clips, barrier, results)) for _ in range(num_workers)]
    for process in processes:
        process.start()
    barrier.wait()  # all have read all
    workers_s = time.perf_counter() - started
    parent = memory()
    workers = [results.get() for _ in processes]
    barrier.wait()
    for process in processes:
        process.join()
    mean = {name: sum(worker[name] for worker in workers) / num_workers for name in parent}
    return {
        "kind": kind,
        "method": method,
        "build_s": round(build_s, 1),
        "workers_s": round(workers_s, 1),
        "parent_rss_before_mib": round(before["rss"] / MIB),
        "parent_rss_mib": round(built["rss"] / MIB),
        "parent_peak_rss_mib": round(peak / MIB),
        **{f"worker_{name}_mib": round(value / MIB) for name, value in mean.items()},
        "all_pss_mib": round((parent["pss"] + sum(worker["pss"] for worker in workers)) / MIB),
        "all_anonymous_mib": round((parent["anonymous"] + sum(worker["anonymous"] for worker in workers)) / MIB),
    }


def work(clips: Sequence[Clip], barrier: Any, results: Any) -> None:
    characters = sum(len(clips[index].captions[0]) for index in range(len(clips)))
    assert characters
    barrier.wait()
    results.put(memory())
    barrier.wait()


def memory() -> dict[str, int]:
    """Returns resident, proportional and anonymous bytes of this process; the last two are 0 where not reported."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "pss": 0, "anonymous": 0}
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in rollup.read_text().splitlines()[1:]}
    return {"rss": found["Rss"], "pss": found["Pss"], "anonymous": found["Anonymous"]}


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['clips']:,} clips, {result['file_mib']} MiB of JSON lines, {result['workers']} workers; "
        f"{result['machine']}"
    )
    rows = result["rows"]
    width = max(map(len, rows[0]))
    for name in rows[0]:
        print(f"{name:{width}}  " + "  ".join(f"{row[name]:>8}" for row in rows))


if __name__ == "__main__":
    main()
