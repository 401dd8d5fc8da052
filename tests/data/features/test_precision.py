"""Sizes told beforehand, and errors stated as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlmcap.data.features.filling import FillSettings, fill_store
from vlmcap.data.features.index import FILE
from vlmcap.data.features.precision import DTYPES, ErrorSums, dequantize, is_finite, measure, quantize, size_bytes
from vlmcap.data.features.store import FeatureStore
from vlmcap.errors import UserError

Make = Callable[..., Any]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stated_error_is_that_of_all_that_is_read(
    tmp_path: Path, numbered: Make, make_recipe: Make, dtype: str
) -> None:
    clips = numbered(broken=(4,))
    store = FeatureStore(tmp_path / "features", make_recipe(dtype=dtype))
    assert store.deviation is None
    fill_store(store, clips.hashes, clips.batches, clips.encode, settings=FillSettings(chunk_clips=4, shard_bytes=500))
    numbers = [number for number in range(20) if number != 4]
    exact = torch.stack([clips.features(number) for number in numbers]).double()
    error = torch.stack([store.read(clips.hashes[number])[0] for number in numbers]).double() - exact
    rms = float(exact.square().mean().sqrt())
    for stated in (store.deviation, FeatureStore(tmp_path / "features", make_recipe(dtype=dtype)).deviation):
        assert stated is not None
        assert stated.max == pytest.approx(float(error.abs().max()) / rms, rel=1e-6)
        assert stated.rms == pytest.approx(float(error.square().mean().sqrt()) / rms, rel=1e-6)
        assert (stated.max == 0) == (dtype == "float32")
        assert stated.rms < {"float16": 3e-4, "bfloat16": 3e-3, "float32": 1e-9, "int8": 1e-2}[dtype]


@given(arrays(np.float32, (3, 2, 5), elements=st.floats(-60_000, 60_000, width=32)))
@settings(max_examples=200, deadline=None)
def test_int8_is_off_by_half_a_step_at_most(values: np.ndarray) -> None:
    features = torch.from_numpy(values)
    numbers, scale = quantize(features)
    read = dequantize(numbers, scale)
    step = features.abs().amax(-1, keepdim=True) / 127
    rounding = read.double().abs() * 2**-11 + 2**-25  # to float16, subnormal numbers too
    assert numbers.dtype == torch.int8 and scale.shape == (3, 2) and read.dtype == torch.float16
    assert ((read.double() - features.double()).abs() <= step.double() * (0.5 + 1e-5) + rounding * 1.001).all()


def test_errors_add_up() -> None:
    whole, parts = torch.randn(10, 8), ErrorSums()
    for rows in whole.split(3):
        parts.add(measure(rows, rows.half()))
    stated, expected = parts.deviation, measure(whole, whole.half()).deviation
    assert stated is not None and expected is not None
    assert (stated.max, stated.rms) == pytest.approx((expected.max, expected.rms))
    assert ErrorSums().deviation is None
    assert measure(torch.zeros(2, 3), torch.zeros(2, 3)).deviation is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_is_told_beforehand(tmp_path: Path, numbered: Make, make_recipe: Make, dtype: str) -> None:
    clips = numbered(200, width=256)
    store = FeatureStore(tmp_path / "features", make_recipe(dtype=dtype))
    fill_store(store, clips.hashes, clips.batches, clips.encode)
    told = size_bytes(200, 2, 4, 256, dtype)
    assert told < store.num_bytes < told + 200 * (300 if dtype == "int8" else 200) + 1000
    files = [path for path in store.folder.glob("*.safetensors") if path.name != FILE]
    assert store.num_bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("given", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_measured_from_what_the_encoder_gave(
    tmp_path: Path, numbered: Make, make_recipe: Make, given: str, dtype: str
) -> None:
    clips = numbered(3)
    features = {number: clips.features(number).to(getattr(torch, given)) for number in range(3)}
    store = FeatureStore(tmp_path / "features", make_recipe(dtype=dtype))
    fill_store(store, clips.hashes, clips.batches, lambda frames, grids: clips.encode(frames).to(getattr(torch, given)))
    exact = torch.stack(list(features.values())).double()
    error = torch.stack([store.read(content)[0] for content in clips.hashes]).double() - exact
    assert store.deviation is not None
    assert store.deviation.max * float(exact.square().mean().sqrt()) == pytest.approx(
        float(error.abs().max()), rel=1e-5
    )


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_number_that_is_not_finite_is_found(odd: float, dtype: torch.dtype) -> None:
    numbers = torch.randn(3, 50, 7).to(dtype)
    assert is_finite(numbers)
    for position in (0, 500, 1049):
        changed = numbers.clone()
        changed.view(-1)[position] = odd
        assert not is_finite(changed)


def test_int8_takes_half_of_float16() -> None:
    assert size_bytes(1, 8, 729, 1152, "float16") == 8 * 729 * 1152 * 2
    assert size_bytes(1, 8, 729, 1152, "int8") == 8 * 729 * (1152 + 4)
    with pytest.raises(UserError, match=r"cache\.dtype must be one of float16, bfloat16, float32, int8, not 'int4'"):
        size_bytes(1, 1, 1, 1, "int4")
