"""Lengths are the true tokenizer's, counted once, and those of the batches that come of them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.tiny_training import MAX_CAPTION, NUM_VISUAL, LetterPrompt, tiny_clips
from vlmcap.data.loading import lengths as module
from vlmcap.data.loading.collate import Collator
from vlmcap.data.loading.lengths import CHUNK, caption_lengths, count_tokens, sequence_lengths
from vlmcap.types import Clip, Sample

words = str.split  # a builtin, which a new process finds without importing the tests


def refuse(text: str) -> Sequence[int]:
    raise AssertionError("counted again")


def clips_with(*captions: str) -> list[Clip]:
    return [Clip(str(index), f"{index}.mp4", (caption, "다른 글")) for index, caption in enumerate(captions)]


def test_first_captions_and_their_ends_are_counted(tmp_path: Path) -> None:
    clips = [*clips_with("가 나 다", "", "해가 뜬다"), Clip("bare", "bare.mp4", ())]
    counted = caption_lengths(clips, words, folder=tmp_path / "new", fingerprint="a")
    assert counted.dtype == np.int32
    assert counted.tolist() == [4, 0, 3, 0]
    assert caption_lengths([], words, folder=tmp_path, fingerprint="a").tolist() == []


def test_counts_are_kept_by_captions_and_tokenizer(tmp_path: Path) -> None:
    clips = clips_with("가 나", "다")
    first = caption_lengths(clips, words, folder=tmp_path, fingerprint="a")
    assert caption_lengths(clips, refuse, folder=tmp_path, fingerprint="a").tolist() == first.tolist()
    moved = [dataclasses.replace(clip, id=f"{clip.id}x", video="other.mp4") for clip in clips]
    assert caption_lengths(moved, refuse, folder=tmp_path, fingerprint="a").tolist() == first.tolist()
    for other in (clips_with("가 나", "라"), clips_with("가", "나다"), clips_with("다", "가 나"), clips[:1]):
        with pytest.raises(AssertionError, match="counted again"):
            caption_lengths(other, refuse, folder=tmp_path, fingerprint="a")
    with pytest.raises(AssertionError, match="counted again"):
        caption_lengths(clips, refuse, folder=tmp_path, fingerprint="b")
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"], "nothing is left of a count that failed"


def test_processes_count_as_one_does(tmp_path: Path) -> None:
    clips = clips_with(*("말 " * (1 + index % 7) for index in range(2 * CHUNK + 5)))
    several = caption_lengths(clips, words, folder=tmp_path, fingerprint="a", num_processes=2)
    assert several.tolist() == count_tokens(clips, words).tolist()


def test_processes_are_started_for_many_clips_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert [module._process_count(count) for count in (0, 10_000, 100_000, 1_000_000)] == [1, 1, 2, 8]


def test_a_sequence_is_as_long_as_in_the_batch() -> None:
    prompt, clips = LetterPrompt(), tiny_clips()
    captions = count_tokens(clips, prompt.encode_caption)
    assert captions.max() > MAX_CAPTION > captions.min()
    expected = sequence_lengths(
        captions,
        max_caption_tokens=MAX_CAPTION,
        prompt_tokens=len(prompt.prefix_ids) + len(prompt.suffix_ids),
        visual_tokens=NUM_VISUAL,
    )
    samples = [Sample(clip, features=torch.zeros(2, 2, 8)) for clip in clips]
    batch = Collator(prompt, NUM_VISUAL, MAX_CAPTION)(samples)
    assert batch.attention_mask.sum(dim=1).tolist() == expected.tolist()
    packed = Collator(prompt, NUM_VISUAL, MAX_CAPTION, is_packed=True)(samples)
    assert packed.input_ids.shape == (1, expected.sum())


def test_visual_tokens_may_differ_from_clip_to_clip() -> None:
    lengths = sequence_lengths(
        np.array([3, 9, 0], dtype=np.int32),
        max_caption_tokens=5,
        prompt_tokens=10,
        visual_tokens=np.array([100, 200, 300]),
    )
    assert lengths.tolist() == [113, 215, 310]


def test_damaged_counts_are_made_again(tmp_path: Path) -> None:
    clips = clips_with("가", "나다", "라마바")
    expected = caption_lengths(clips, list, folder=tmp_path, fingerprint="a").tolist()  # type: ignore[arg-type]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        assert caption_lengths(clips, list, folder=tmp_path, fingerprint="a").tolist() == expected, position  # type: ignore[arg-type]
    for damaged in (b"", whole[:40], whole[:-3]):
        path.write_bytes(damaged)
        assert caption_lengths(clips, list, folder=tmp_path, fingerprint="a").tolist() == expected  # type: ignore[arg-type]


class Unwell:
    """Counts words, but a process other than the one that made it hangs or dies at one caption."""

    def __init__(self, how: str) -> None:
        self.how, self.owner = how, os.getpid()

    def __call__(self, text: str) -> Sequence[int]:
        if text == "나" and os.getpid() != self.owner:
            time.sleep(600) if self.how == "hangs" else os._exit(9)
        return [0] * len(text)


@pytest.mark.parametrize("how", ["hangs", "dies"])
@pytest.mark.slow
def test_a_process_that_hangs_or_dies_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "_CHUNK_TIMEOUT_S", 15.0)
    clips = clips_with("가", "나", "다라", "마")
    found = caption_lengths(clips, Unwell(how), folder=tmp_path, fingerprint="a", num_processes=2)
    assert found.tolist() == [2, 2, 3, 2]
