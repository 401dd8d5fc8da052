"""The demo data set on disk: real clips in the AI Hub layout, the same from a seed, with facts kept from training."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import av
import pytest

from vlmcap.config import AihubConfig, DemoConfig
from vlmcap.data.formats import Record, read_records
from vlmcap.demo import clips as make
from vlmcap.demo.clips import is_held_out, make_demo
from vlmcap.demo.grammar import FACTS, Scene
from vlmcap.demo.render import FPS, NUM_FRAMES, SIZE
from vlmcap.metrics import FactLexicon
from vlmcap.types import Clip

SETTINGS = DemoConfig(num_train=6, num_val=3, num_test=3, seed=5)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"), SETTINGS)


def content(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_equal_settings_give_equal_files_and_another_seed_others(demo: Path, tmp_path: Path) -> None:
    assert content(make_demo(tmp_path, SETTINGS)) == content(demo)
    other = make_demo(tmp_path, replace(SETTINGS, seed=6))
    assert other.name != demo.name
    assert not set(content(other).values()) & {digest for name, digest in content(demo).items() if name != "facts.json"}


def read_clips(folder: Path, split: str) -> list[Clip]:
    return [entry.clip for entry in read_records(AihubConfig(root=str(folder)), split) if isinstance(entry, Record)]


def test_the_ordinary_loader_reads_it(demo: Path) -> None:
    lexicon = FactLexicon.from_json(demo / "facts.json")
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        clips = read_clips(demo, split)
        assert [clip.id for clip in clips] == [f"{split}_{index:05d}" for index in range(count)]
        for clip in clips:
            label = json.loads((demo / split / "labels" / f"{clip.id}.json").read_text(encoding="utf-8"))
            assert clip.captions == (label["annotation"]["description_kr"],)
            assert lexicon.extract(clip.captions[0]) == label["facts"]


def test_clips_are_h264_video(demo: Path) -> None:
    for clip in read_clips(demo, "test"):
        with av.open(str(clip.video)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (SIZE, SIZE, FPS)
            assert sum(1 for _ in container.decode(video=0)) == NUM_FRAMES


def facts_of(settings: DemoConfig) -> dict[str, set[tuple[str, ...]]]:
    scenes: dict[str, set[tuple[str, ...]]] = {}
    for job in make._plan(settings):
        facts = asdict(job.scene)
        facts.pop("camera")
        scenes.setdefault(job.split, set()).add(tuple(facts.values()))
    return scenes


def test_validation_and_test_hold_only_combinations_that_training_never_saw() -> None:
    scenes = facts_of(DemoConfig(num_train=2000, num_val=100, num_test=200, seed=0))
    assert not scenes["train"] & (scenes["val"] | scenes["test"])
    assert all(is_held_out(Scene(*facts, camera="고정")) for split in ("val", "test") for facts in scenes[split])
    assert not any(is_held_out(Scene(*facts, camera="이동")) for facts in scenes["train"])
    for index, fact in enumerate(name for name in FACTS if name != "camera"):
        assert (
            {facts[index] for facts in scenes["train"]}
            == {facts[index] for facts in scenes["test"]}
            == set(FACTS[fact])
        )


def test_an_interrupted_making_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make._write_one
    written: list[str] = []

    def interrupt(root: Path, job: make._Job) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(job.name)
        original(root, job)

    monkeypatch.setattr(make, "_write_one", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path, SETTINGS)
    assert len(written) == 4
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_made_again(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "_write_one", None)
    assert make_demo(demo.parent, SETTINGS) == demo


def test_progress_counts_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        make, "progress_reporter", lambda label: nullcontext(lambda done, total: seen.append((done, total)))
    )
    make_demo(tmp_path, DemoConfig(2, 1, 1, seed=0))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_clips_are_written_by_no_more_processes_than_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a container with one core of 64 must not start 64, which would need gigabytes."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("one usable processor needs no pool")

    written: list[str] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(make, "ProcessPoolExecutor", refuse)
    monkeypatch.setattr(make, "_write_one", lambda _, job: written.append(job.name))
    make_demo(tmp_path, replace(SETTINGS, num_train=120))
    assert len(written) == 126
