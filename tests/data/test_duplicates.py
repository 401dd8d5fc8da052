"""Copies are found however they are encoded, other clips are not, and no near pair is missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vlmcap.data.decoding.video import decode_frames, write_video
from vlmcap.data.duplicates import MAX_DISTANCE, look_alikes, picture_hash


def clip_hash(path: Path, side: tuple[int, int] = (90, 160)) -> NDArray[np.uint64]:
    frames = decode_frames(path, 3)
    return picture_hash(F.interpolate(frames.float(), side, mode="area").to(torch.uint8))


def test_a_re_encoded_smaller_copy_is_found_among_real_clips(real_clips: dict[str, Path], tmp_path: Path) -> None:
    names = sorted(real_clips)
    with av.open(str(real_clips["bikes"])) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        half = [frame.to_ndarray(format="rgb24", width=320, height=136) for frame in container.decode(stream)]
    write_video(tmp_path / "copy.mp4", np.stack(half), fps=rate, crf=35)
    hashes = np.stack([clip_hash(path) for path in [*(real_clips[name] for name in names), tmp_path / "copy.mp4"]])
    groups = look_alikes(hashes)
    assert [names.index("bikes"), len(names)] in groups
    # The two carphone clips show one scene in two encodings; nothing else is alike.
    others = [{names[i] for i in group} for group in groups if len(names) not in group]
    assert all(all("carphone" in name for name in group) for group in others)


def test_no_near_pair_is_missed_and_no_far_one_is_found() -> None:
    generator = np.random.default_rng(0)
    base = generator.integers(0, 2**63, (40, 3), dtype=np.uint64)
    rows, families = [], []
    for family, row in enumerate(base):
        for _ in range(3):
            bits = np.zeros(192, dtype=bool)
            bits[generator.choice(192, MAX_DISTANCE // 2, replace=False)] = True
            rows.append(row ^ np.packbits(bits, bitorder="little").view("<u8"))
            families.append(family)
    order = generator.permutation(len(rows))
    groups = look_alikes(np.stack(rows)[order])
    expected: dict[int, list[int]] = {}
    for place, index in enumerate(order):
        expected.setdefault(families[index], []).append(place)
    assert groups == sorted(expected.values())


def test_equal_hashes_are_one_group_however_many(make_frames: Callable[..., NDArray[np.uint8]]) -> None:
    black = picture_hash(torch.zeros((3, 3, 40, 60), dtype=torch.uint8))
    assert black.tolist() == [0, 0, 0]
    moving = picture_hash(torch.from_numpy(make_frames(3)).permute(0, 3, 1, 2))
    groups = look_alikes(np.concatenate([np.tile(black, (5000, 1)), moving[None]]))
    assert groups == [list(range(5000))]
    with pytest.raises(ValueError, match="max_distance"):
        look_alikes(np.zeros((2, 3), np.uint64), 12)
