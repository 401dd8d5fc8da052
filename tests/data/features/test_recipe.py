"""A name that changes with everything that features depend on, and with nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcap.data.features.recipe import Recipe, cache_key, is_key
from vlmcap.errors import UserError

CHANGES = {
    "encoder": "cd" * 32,
    "layer": -1,
    "transform": {"kind": "Resize", "size": 5},
    "num_frames": 3,
    "sampling": "fps",
    "fps": 2.0,
    "variable_frames": True,
    "decoder": "torchcodec",
    "pooled": {"size": 2},
    "precision": "bf16-mixed",
    "dtype": "int8",
    "version": 99,
}


def test_everything_that_counts_is_tried() -> None:
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert names == CHANGES.keys() | {"encoder_name", "revision"}


@pytest.mark.parametrize("name", CHANGES)
def test_another_recipe_has_another_key(make_recipe: Callable[..., Recipe], name: str) -> None:
    plain = make_recipe()
    other = dataclasses.replace(plain, **{name: CHANGES[name]})
    assert is_key(plain.key)
    assert other.key != plain.key
    assert other != plain


def test_where_the_weights_came_from_does_not_count(make_recipe: Callable[..., Recipe]) -> None:
    assert make_recipe().key == make_recipe(encoder_name="x/y", revision="0123").key


def test_an_unknown_dtype_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"cache\.dtype must be one of float16, bfloat16, float32, int8, not 'int4'"):
        make_recipe(dtype="int4")


def test_the_key_is_canonical() -> None:
    key = cache_key(encoder="clip", size=(336, 336), frames=8, options={"b": 1, "a": None})
    assert key == cache_key(options={"a": None, "b": 1}, frames=8, size=[336, 336], encoder="clip")
    assert key != cache_key(encoder="clip", size=(336, 336), frames=8, options={"b": True, "a": None})
    for odd in (Path("x"), torch.float16, {1: 2}, {1}):
        with pytest.raises(TypeError, match="cache key"):
            cache_key(part=odd)
    with pytest.raises(ValueError):
        cache_key(part=float("nan"))


@pytest.mark.parametrize(
    "text", ["", "..", "../../etc/passwd00", "0123456789abcde/", "0123456789ABCDEF", "0123456789abcdef\n", "0" * 17]
)
def test_only_keys_are_keys(text: str) -> None:
    assert is_key("0123456789abcdef")
    assert not is_key(text)


def test_plain_values_only(make_recipe: Callable[..., Any]) -> None:
    with pytest.raises(TypeError):
        _ = make_recipe(transform={"size": Path("x")}).key
