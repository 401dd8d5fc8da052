"""Slots of the cache are written in place, moved, and grown for longer prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmcap.models.decoding.cache import SlotCache


def states(slots: int, tokens: int, value: float) -> Tensor:
    return torch.full((slots, 2, tokens, 4), value)


def test_slots_of_different_lengths_see_their_own_tokens() -> None:
    cache = SlotCache(3)
    assert cache.reserve(16)
    cache.expect_prompts(0, 5)
    keys, _ = cache.update(states(2, 5, 1.0), states(2, 5, 2.0), 0)
    assert keys.shape == (2, 2, 5, 4)
    cache.expect_prompts(2, 3)
    cache.update(states(1, 3, 5.0), states(1, 3, 6.0), 0)
    lengths = torch.tensor([5, 4, 3])  # the second prompt was padded
    positions, mask = cache.expect_step(lengths, 8, 2)
    keys, values = cache.update(states(3, 2, 7.0), states(3, 2, 8.0), 0)
    assert positions.tolist() == [[5, 6], [4, 5], [3, 4]]
    assert mask.shape == (3, 1, 2, keys.shape[2])
    assert mask.sum(-1)[:, 0].tolist() == [[6, 7], [5, 6], [4, 5]]
    for slot, (length, prompt) in enumerate(zip((5, 4, 3), (1.0, 1.0, 5.0), strict=True)):
        assert keys[slot, 0, : length + 2, 0].tolist() == [prompt] * length + [7.0] * 2
        assert values[slot, 0, : length + 2, 0].tolist() == [prompt + 1] * length + [8.0] * 2


def test_buffers_keep_their_address_and_content_until_more_is_reserved() -> None:
    cache = SlotCache(1)
    cache.reserve(256)
    cache.expect_prompts(0, 3)
    cache.update(states(1, 3, 1.0), states(1, 3, 1.0), 0)
    places = []
    for length in range(3, 300):
        if length == 256:
            assert cache.reserve(304)
            assert not cache.reserve(300)
        cache.expect_step(torch.tensor([length]), length + 1, 1)
        keys, _ = cache.update(states(1, 1, float(length)), states(1, 1, float(length)), 0)
        places.append(keys.data_ptr())
    assert len(set(places[:253])) == len(set(places[253:])) == 1
    assert keys[0, 1, :300, 2].tolist() == [1.0, 1.0, 1.0, *map(float, range(3, 300))]


def test_moved_slots_keep_their_keys_in_all_layers() -> None:
    cache = SlotCache(4)
    cache.reserve(8)
    for layer in (0, 1):
        cache.expect_prompts(0, 2)
        cache.update(torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 2, 2, 4), states(4, 2, 0.0), layer)
    cache.move_slots([3, 2], [0, 1])
    for layer in (0, 1):
        cache.expect_step(torch.tensor([2, 2]), 4, 1)
        keys, _ = cache.update(states(2, 1, 9.0), states(2, 1, 9.0), layer)
        assert keys[:, 0, :3, 0].tolist() == [[3.0, 3.0, 9.0], [2.0, 2.0, 9.0]]
