"""Speed of the feature store against a plain file per clip, by `np.fromfile` and by `torch.load`.

    python benchmarks/cache/store.py [--mib 400] [--repeats 3] [--output F.json]

All write the same float16 features, down to the disk (fsync), and read each clip once in one random order: "cached"
when the files are in the system's cache, "again" in a second epoch, for which the store has compared all checksums, and
"cold" after the files were dropped from that cache. The store also checks every number, measures the storage error and
locks its work. Ways take turns within each repeat; the figures are medians, in MB/s of float16 features.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vlmcap.config import DataConfig
from vlmcap.data.features.filling import fill_store
from vlmcap.data.features.recipe import Recipe
from vlmcap.data.features.store import FeatureStore
from vlmcap.types import Clip, Sample, Skipped

SHAPES = {
    "8 x 729 x 1152, a clip of a large encoder": (8, 729, 1152),
    "8 x 81 x 1152, the same pooled": (8, 81, 1152),
    "8 x 4 x 192, a tiny encoder": (8, 4, 192),
}
STORED = {"store, float16": "float16", "store, int8": "int8"}
WAYS = (*STORED, "np.fromfile", "torch.load")
MEASURES = ("write", "read cached", "read again", "read cold")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    rows = []
    for name, shape in SHAPES.items():
        size = int(np.prod(shape)) * 2
        num_clips = max(8, min(2_000, arguments.mib * 2**20 // size))
        figures: dict[str, dict[str, list[float]]] = {way: {measure: [] for measure in MEASURES} for way in WAYS}
        for repeat in range(arguments.repeats):
            for way in WAYS[repeat % len(WAYS) :] + WAYS[: repeat % len(WAYS)]:
                with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                    for measure, seconds in run(way, Path(folder), shape, num_clips).items():
                        figures[way][measure].append(num_clips * size / seconds / 1e6)
        for way in WAYS:
            medians = {measure: statistics.median(values) for measure, values in figures[way].items()}
            rows.append({"features": name, "clips": num_clips, "way": way, **medians})
    result = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        "repeats": arguments.repeats,
        "rows": rows,
    }
    show(result)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=400, help="of features a way")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def run(way: str, folder: Path, shape: tuple[int, ...], num_clips: int) -> dict[str, float]:
    """Returns the seconds of each measure."""
    features = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0)).half()
    started = time.perf_counter()
    write = write_store if way in STORED else write_files
    open_reader = write(folder, way, features, num_clips)
    seconds = {"write": time.perf_counter() - started}
    order = np.random.default_rng(0).permutation(num_clips)
    read = open_reader()
    for measure in ("read cached", "read again", "read cold"):
        if measure == "read cold":
            drop(folder)
            read = open_reader()
        started = time.perf_counter()
        checks = [read(int(number)) for number in order]
        seconds[measure] = time.perf_counter() - started
        tolerance = 0.05 if way == "store, int8" else 0
        for number, tensor in zip(order[-4:], checks[-4:], strict=True):
            assert float((tensor.float() - features[number % 16].float()).abs().max()) <= tolerance
        del checks
    return seconds


def write_store(
    folder: Path, way: str, features: torch.Tensor, num_clips: int
) -> Callable[[], Callable[[int], torch.Tensor]]:
    data = DataConfig()
    recipe = Recipe(
        encoder="00" * 32,
        layer=-2,
        transform={"size": 384},
        num_frames=8,
        sampling=data.sampling.value,
        fps=data.fps,
        variable_frames=data.variable_frames,
        decoder=data.decoder.value,
        pooled=None,
        precision="32-true",
        dtype=STORED[way],
    )
    hashes = np.array([hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(num_clips)], "S32")
    frame = torch.zeros(features.shape[1], 3, 1, 1, dtype=torch.uint8)

    def batches(positions: NDArray[np.int64]) -> Iterator[list[Sample | Skipped]]:
        for start in range(0, len(positions), 16):
            part = positions[start : start + 16]
            yield [Sample(Clip("", "", ()), frames=frame + int(number % 16)) for number in part]

    fill_store(
        FeatureStore(folder, recipe),
        hashes,
        batches,
        lambda frames, grids: [features[int(number)] for number in frames[:, 0, 0, 0, 0]],
    )

    def open_reader() -> Callable[[int], torch.Tensor]:
        store = FeatureStore(folder, recipe)
        return lambda number: store.read(bytes(hashes[number]))[0]

    return open_reader


def write_files(
    folder: Path, way: str, features: torch.Tensor, num_clips: int
) -> Callable[[], Callable[[int], torch.Tensor]]:
    for number in range(num_clips):
        tensor = features[number % 16]
        with (folder / f"{number}.bin").open("wb") as file:
            if way == "np.fromfile":
                tensor.numpy().tofile(file)
            else:
                torch.save(tensor.clone(), file)  # a view would save all 16
            file.flush()
            os.fsync(file.fileno())

    def read(number: int) -> torch.Tensor:
        path = folder / f"{number}.bin"
        if way == "np.fromfile":
            return torch.from_numpy(np.fromfile(path, np.float16)).view(features.shape[1:])
        tensor: torch.Tensor = torch.load(path, weights_only=True)
        return tensor

    return lambda: read


def drop(folder: Path) -> None:
    """Drops the files from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}, {', '.join(f'{name} {version}' for name, version in result['versions'].items())}")
    for name in SHAPES:
        rows = [row for row in result["rows"] if row["features"] == name]
        base = next(row for row in rows if row["way"] == "np.fromfile")
        print(f"\n{name}: {rows[0]['clips']} clips, MB/s (times np.fromfile)")
        print(f"{'':16}" + "".join(f"{measure:>20}" for measure in MEASURES))
        for row in rows:
            cells = [f"{row[measure]:,.0f} ({row[measure] / base[measure]:.2f})" for measure in MEASURES]
            print(f"{row['way']:16}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
