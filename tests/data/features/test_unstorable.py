"""What cannot be stored ends in a sentence with the mend, and what was stored before stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmcap.data.features import filling
from vlmcap.data.features.content_hash import UNREADABLE
from vlmcap.data.features.filling import fill_store
from vlmcap.data.features.precision import DTYPES
from vlmcap.data.features.store import FeatureStore
from vlmcap.errors import UserError

Make = Callable[..., Any]


def refuse(*_: object) -> Any:
    raise AssertionError("called without need")


def overflowing(frames: Tensor, grids: object) -> Tensor:
    return torch.full((len(frames), 2, 4, 8), 7e4)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_features_that_overflow_are_refused(tmp_path: Path, numbered: Make, make_recipe: Make, dtype: str) -> None:
    clips = numbered(5)
    with pytest.raises(UserError, match=rf"클립0 overflow cache\.dtype={dtype}; set cache\.dtype=bfloat16"):
        fill_store(FeatureStore(tmp_path, make_recipe(dtype=dtype)), clips.hashes, clips.batches, overflowing)
    fill_store(FeatureStore(tmp_path, make_recipe(dtype="bfloat16")), clips.hashes, clips.batches, overflowing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_that_are_not_finite_are_refused(
    tmp_path: Path, numbered: Make, make_recipe: Make, dtype: str
) -> None:
    clips = numbered(5)
    store = FeatureStore(tmp_path / "features", make_recipe(dtype=dtype))

    def failing(frames: Tensor, grids: object) -> Tensor:
        features = clips.encode(frames)
        return torch.where(torch.tensor(4 in clips.encoded()), features / 0, features)

    with pytest.raises(UserError, match="클립3 are not finite, because the encoder overflows; choose another"):
        fill_store(store, clips.hashes, clips.batches, failing)
    store.refresh()
    assert store.missing(clips.hashes).tolist() == [3, 4]  # what came before is kept


def test_a_store_of_nothing_is_refused(tmp_path: Path, numbered: Make, make_recipe: Make) -> None:
    clips = numbered(2, broken=(0, 1))
    store = FeatureStore(tmp_path / "features", make_recipe())
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 clips can be encoded, because 0\.mp4 is broken"):
            fill_store(store, clips.hashes, clips.batches, refuse)
    with pytest.raises(UserError, match="none of the 1 clips can be encoded, because their files cannot be opened"):
        fill_store(store, np.array([UNREADABLE], "S32"), refuse, refuse)


def test_a_full_disk_is_told_beforehand(
    tmp_path: Path, numbered: Make, make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = numbered()
    store = FeatureStore(tmp_path / "features", make_recipe())
    usage = type("Usage", (), {"free": 20 * 2 * 4 * 8 * 2 - 1})
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.0 GB more in .* or set cache\.dtype=int8"):
        fill_store(store, clips.hashes, clips.batches, clips.encode)
    assert len(clips.encoded()) == 3
    usage.free += 1  # type: ignore[attr-defined]
    fill_store(store, clips.hashes, clips.batches, clips.encode)


def test_a_disk_that_fills_up_meanwhile_is_a_sentence(
    tmp_path: Path, numbered: Make, make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = numbered()
    store = FeatureStore(tmp_path / "features", make_recipe())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlmcap.data.features.shards.os.fsync", fail)
    with pytest.raises(UserError, match="is full; free some space and start again, which continues from here"):
        fill_store(store, clips.hashes, clips.batches, clips.encode)
    assert not [path for path in store.folder.rglob("*") if "safetensors" in path.name]
