"""A bad video becomes a `Skipped` with its reason; cached features equal those computed on the fly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlmcap.data.dataset import ClipDataset, FeatureDataset
from vlmcap.data.feature_cache import FeatureCache
from vlmcap.errors import UserError
from vlmcap.types import Clip, Sample, Skipped


def shrink(frames: Tensor) -> Tensor:
    return frames[:, :, ::4, ::4].contiguous()


def encode(frames: Tensor, grids: object = None) -> Tensor:
    """(B, F, 3, H, W) -> (B, F, P, Dv): a fixed random projection of columns of pixels."""
    weights = torch.randn(3 * frames.shape[3], 5, generator=torch.Generator().manual_seed(0))
    return frames.float().div(255).permute(0, 1, 4, 2, 3).flatten(3) @ weights


def as_list(items: list[Sample | Skipped]) -> list[Sample | Skipped]:
    return items


def test_bad_videos_are_skipped_with_a_reason(small_clips: list[Clip]) -> None:
    dataset = ClipDataset(small_clips, num_frames=4, frame_transform=shrink)
    items = [dataset[i] for i in range(len(dataset))]
    assert {item.clip.id: item.reason for item in items if isinstance(item, Skipped)} == {
        "empty": "empty.mp4 cannot be read: the file is empty",
        "text": "text.mp4 cannot be read: it is damaged, truncated or no video (Invalid data found when processing input)",
    }
    samples = [item for item in items if isinstance(item, Sample)]
    assert [sample.clip.id for sample in samples] == ["good0", "good1", "good2"]
    for sample in samples:
        assert sample.features is None
        assert sample.frames is not None
        assert sample.frames.dtype == torch.uint8
        assert sample.frames.shape == (4, 3, 12, 16)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_cached_features_equal_computed_ones(tmp_path: Path, small_clips: list[Clip], num_workers: int) -> None:
    dataset = ClipDataset(small_clips, num_frames=4, frame_transform=shrink)
    cache = FeatureCache(tmp_path, "key")
    loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=as_list)
    cache.build(loader, encode, len(dataset), "float32")
    assert cache.shape == (3, 4, 16, 5)
    cached = FeatureDataset(small_clips, FeatureCache(tmp_path, "key"))
    read = [item for batch in DataLoader(cached, batch_size=2, num_workers=num_workers, collate_fn=as_list) for item in batch]
    assert len(read) == len(dataset)
    for i, item in enumerate(read):
        plain = dataset[i]
        if isinstance(plain, Skipped):
            assert item == plain
        else:
            assert plain.frames is not None
            assert isinstance(item, Sample)
            assert item.features is not None
            torch.testing.assert_close(item.features, encode(plain.frames[None])[0])


def test_clips_that_the_cache_lacks_are_named(tmp_path: Path, small_clips: list[Clip]) -> None:
    with pytest.raises(UserError, match="no complete feature cache"):
        FeatureDataset(small_clips, FeatureCache(tmp_path, "key"))
    cache = FeatureCache(tmp_path, "key")
    clip = Clip("x", tmp_path / "x.mp4", ("나",))
    cache.build([[Sample(clip, frames=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))]], encode, 1)
    with pytest.raises(UserError, match="lacks 5 of 5 clips, first: empty"):
        FeatureDataset(small_clips, cache)
