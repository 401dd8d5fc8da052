"""Writes the demo data set in the AI Hub layout, so that the ordinary loader reads it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from vlmcap.config import DemoConfig
from vlmcap.data.get_or_create import get_or_create
from vlmcap.demo.grammar import FACTS, Scene, describe, draw_scene
from vlmcap.libraries import usable_processors
from vlmcap.terminal import progress_reporter

_VERSION = 4  # raise when clips or captions of a seed change
_MAX_WORKERS = 8  # about 100 MiB of memory each
_HELD_OUT = 8  # one in so many combinations of facts is kept for validation and test


def make_demo(folder: Path, settings: DemoConfig) -> Path:
    """Returns the folder of the data set, which is written if it does not exist and is never incomplete.

    Args:
        folder: Parent folder, which may also hold data sets of other settings.
        settings: Sizes and seed; equal ones give equal clips and captions.
    """
    key = hashlib.sha256(json.dumps([_VERSION, asdict(settings)]).encode()).hexdigest()[:10]

    def write(target: Path) -> None:
        with progress_reporter("writing demo clips") as report:
            _write_all(target, list(_plan(settings)), report)
        (target / "facts.json").write_text(json.dumps(FACTS, ensure_ascii=False, indent=1), encoding="utf-8")

    return get_or_create(folder / f"clips-{key}", write)


@dataclass(frozen=True, slots=True)
class _Job:
    split: str
    name: str
    scene: Scene
    seed: int


def is_held_out(scene: Scene) -> bool:
    """Returns whether this combination of facts is kept from training; camera motion does not count."""
    facts = asdict(scene)
    facts.pop("camera")
    # The first byte of a hash: it does not depend on Python's hash seed, and spreads over all facts.
    return hashlib.sha256("|".join(facts.values()).encode()).digest()[0] % _HELD_OUT == 0


def _plan(settings: DemoConfig) -> Iterator[_Job]:
    for split, count in (("train", settings.num_train), ("val", settings.num_val), ("test", settings.num_test)):
        # A seed for each split: more clips of one split leave those of the others as they are.
        rng = random.Random(f"{settings.seed}/{split}")
        for index in range(count):
            scene = draw_scene(rng)
            # Training draws only from combinations that are not held out, validation and test only from those that are.
            while is_held_out(scene) != (split != "train"):
                scene = draw_scene(rng)
            yield _Job(split, f"{split}_{index:05d}", scene, rng.randrange(2**31))


def _write_all(root: Path, jobs: list[_Job], report: Callable[[int, int], None]) -> None:
    for split in {job.split for job in jobs}:
        (root / split / "videos").mkdir(parents=True)
        (root / split / "labels").mkdir()
    # A further process for every 50 clips, as starting one takes time.
    workers, write = min(len(jobs) // 50 + 1, usable_processors(), _MAX_WORKERS), partial(_write_one, root)
    # Not fork, which may deadlock where the process already has threads.
    with nullcontext() if workers == 1 else ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        written = map(write, jobs) if pool is None else pool.map(write, jobs, chunksize=25)
        for done, _ in enumerate(written, 1):
            report(done, len(jobs))


def _write_one(root: Path, job: _Job) -> None:
    from vlmcap.data.decoding.video import write_video
    from vlmcap.demo.render import FPS, render

    write_video(root / job.split / "videos" / f"{job.name}.mp4", render(job.scene, job.seed), FPS)
    label = {"annotation": {"description_kr": describe(job.scene, random.Random(job.seed))}, "facts": asdict(job.scene)}
    (root / job.split / "labels" / f"{job.name}.json").write_text(
        json.dumps(label, ensure_ascii=False), encoding="utf-8"
    )
