"""Damaged clips and labels: each is read or refused in one sentence that names it.

Nothing crashes, hangs or eats memory.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.data.fuzz import Damaged, damage_videos
from tests.data.fuzz_labels import damage_labels
from vlmcap.config import AihubConfig, DataConfig, JsonlConfig
from vlmcap.data.decoding.video import DecodeLimits
from vlmcap.data.formats import Record, read_records
from vlmcap.data.loading.clip_dataset import ClipDataset
from vlmcap.data.skipped_clips import SkippedClipLog
from vlmcap.data.text import normalize_caption
from vlmcap.errors import UserError
from vlmcap.types import Clip, Sample, Skipped

# Of a decoder that did not end by itself, and of an exception that no code of ours expected.
BAD_ENDS = ("crashed", "was stopped", "was killed", "without an answer", ".py:")
NEVER_READ = {
    "empty",
    "tiny",
    "zeros",
    "noise",
    "text",
    "web page",
    "playlist",
    "session",
    "sound only",
    "no file",
    "picture size",
}
ALWAYS_READ = {"wrong ending", "twice"}  # the names of files say nothing
MEMORY_GIB = 1.0
GROWTH_MIB = 300


def first_frame_small(frames: Tensor) -> Tensor:
    return frames[:, :, ::8, ::8].contiguous()


def as_list(items: list[Sample | Skipped]) -> list[Sample | Skipped]:
    return items


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(scope="module")
def damaged(real_clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Damaged]:
    return damage_videos(real_clips, tmp_path_factory.mktemp("damaged"))


@pytest.fixture(scope="module")
def outcomes(damaged: list[Damaged]) -> list[Sample | Skipped]:
    clips = [Clip(f"{i}", str(one.path), ("글",)) for i, one in enumerate(damaged)]
    data = DataConfig(num_frames=3, decode_timeout_s=20.0, decode_memory_gib=MEMORY_GIB)
    dataset = ClipDataset(
        clips, data, seed=0, frame_transform=first_frame_small, limits=DecodeLimits(max_pixels=2_000_000)
    )
    loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=as_list)
    return [item for batch in loader for item in batch]


@pytest.fixture(scope="module")
def labels() -> list[tuple[str, bytes, bool]]:
    return list(damage_labels())


@pytest.mark.skipif(sys.platform != "linux", reason="pipes, devices and the limit of memory are those of Linux")
class TestVideos:
    def test_there_are_many_of_every_kind(self, damaged: list[Damaged]) -> None:
        kinds = Counter(one.kind for one in damaged)
        assert len(damaged) >= 250
        assert len(kinds) >= 70
        assert min(kinds[kind] for kind in ("truncated", "bits", "headless", "holes", "shuffled")) >= 10

    def test_each_has_one_outcome(self, damaged: list[Damaged], outcomes: list[Sample | Skipped]) -> None:
        assert [item.clip.video for item in outcomes] == [str(one.path) for one in damaged]
        for item in outcomes:
            if isinstance(item, Sample):
                assert item.frames is not None
                assert item.frames.dtype == torch.uint8
                assert item.frames.shape[:2] == (3, 3)

    def test_refusals_are_one_sentence_that_names_the_file(self, outcomes: list[Sample | Skipped]) -> None:
        for item in outcomes:
            if isinstance(item, Skipped):
                assert re.match(rf"{re.escape(Path(item.clip.video).name)} cannot be read: \w", item.reason), (
                    item.reason
                )
                assert len(item.reason) < 300
                assert item.reason.isprintable()

    def test_no_decoder_crashes_or_hangs_or_is_surprised(
        self, damaged: list[Damaged], outcomes: list[Sample | Skipped]
    ) -> None:
        reasons = [
            (one.kind, item.reason) for one, item in zip(damaged, outcomes, strict=True) if isinstance(item, Skipped)
        ]
        assert not [(kind, reason) for kind, reason in reasons if any(end in reason for end in BAD_ENDS)]

    def test_no_process_takes_more_memory_than_it_may(self, outcomes: list[Sample | Skipped]) -> None:
        assert outcomes
        largest_mib = (
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        )  # of those that have ended, their own children too
        assert largest_mib < peak_mib() + 1024 * MEMORY_GIB

    def test_what_was_never_a_video_is_refused_and_good_ones_are_read(
        self, damaged: list[Damaged], outcomes: list[Sample | Skipped]
    ) -> None:
        read = Counter(one.kind for one, item in zip(damaged, outcomes, strict=True) if isinstance(item, Sample))
        assert not NEVER_READ & read.keys()
        assert read.keys() >= ALWAYS_READ
        assert "video size hidden" not in read
        assert len(read) > 20  # damage to what is not needed costs nothing

    def test_each_refused_clip_is_in_the_ledger_and_only_too_many_stop_the_run(
        self, outcomes: list[Sample | Skipped], tmp_path: Path
    ) -> None:
        bad = [item for item in outcomes if isinstance(item, Skipped)]
        skipped_log = SkippedClipLog(tmp_path / "skipped_clips.jsonl", len(bad) / len(outcomes), len(outcomes))
        for item in bad:
            skipped_log.add(item)
            skipped_log.check()
        lines = [json.loads(line) for line in skipped_log.path.read_text(encoding="utf-8").splitlines()]
        assert lines == [{"id": item.clip.id, "video": item.clip.video, "reason": item.reason} for item in bad]
        skipped_log.add(Skipped(Clip("one more", "x.mp4", ()), "it is empty"))
        with pytest.raises(UserError, match=r"data\.max_bad_fraction"):
            skipped_log.check()


class TestLabels:
    def test_aihub(self, labels: list[tuple[str, bytes, bool]], tmp_path: Path) -> None:
        for folder in ("labels", "videos"):
            (tmp_path / "train" / folder).mkdir(parents=True)
        for i, (_, content, _) in enumerate(labels):
            (tmp_path / "train/labels" / f"{i:03d}.json").write_bytes(content)
            (tmp_path / "train/videos" / f"{i:03d}.mp4").write_bytes(b"video")
        before = peak_mib()
        entries = list(read_records(AihubConfig(root=str(tmp_path)), "train"))
        assert peak_mib() - before < GROWTH_MIB
        ids = [entry.clip.id for entry in entries]
        assert ids == [f"{i:03d}" for i in range(len(labels))]
        for (kind, content, is_good), entry in zip(labels, entries, strict=True):
            assert isinstance(entry, Record) == is_good, (kind, content[:80], entry)
            check_label(entry)

    def test_jsonl(self, labels: list[tuple[str, bytes, bool]], tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_bytes(b"video")
        lines = [content for _, content, is_good in one_line(labels) if is_good or not content.isspace()]
        with_video = [content.replace(b"{", b'{"video": "a.mp4", ', 1) for content in lines]
        (tmp_path / "clips.jsonl").write_bytes(b"\n".join(with_video))
        settings = JsonlConfig(root=str(tmp_path), annotations="clips.jsonl", caption_key="annotation.description_kr")
        before = peak_mib()
        entries = list(read_records(settings))
        assert peak_mib() - before < GROWTH_MIB
        assert sum(isinstance(entry, Record) for entry in entries) >= 10
        assert sum(isinstance(entry, Skipped) for entry in entries) >= 50
        for entry in entries:
            check_label(entry)

    def test_a_file_that_is_no_jsonl_at_all_says_so_in_bounded_memory(
        self, tmp_path: Path, real_clips: dict[str, Path]
    ) -> None:
        (tmp_path / "clips.jsonl").write_bytes(real_clips["bikes"].read_bytes())
        for entry in read_records(JsonlConfig(root=str(tmp_path), annotations="clips.jsonl")):
            assert isinstance(entry, Skipped)
            check_label(entry)


def one_line(labels: list[tuple[str, bytes, bool]]) -> Iterator[tuple[str, bytes, bool]]:
    return ((kind, content, is_good) for kind, content, is_good in labels if content and b"\n" not in content)


def check_label(entry: Record | Skipped) -> None:
    """A usable entry has normalized captions that any file can hold; a refusal is one short sentence."""
    if isinstance(entry, Record):
        assert entry.clip.captions
        for caption in entry.clip.captions:
            assert caption == normalize_caption(caption)
            caption.encode("utf-8")
            assert not re.search("[\x00-\x1f\x7f-\x9f]", caption)
        return
    assert len(entry.reason) < 700
    assert entry.reason.isprintable(), entry.reason
    entry.reason.encode("utf-8")
