"""The order depends on (seed, epoch) alone, a resumed epoch goes on exactly, and evaluation repeats nothing."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from vlmcap.data.sampler import ResumableSampler


def order(sampler: ResumableSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = [order(ResumableSampler(50, shuffle=True, seed=1), epoch) for epoch in range(3)]
    again = ResumableSampler(50, shuffle=True, seed=1)
    assert [order(again, epoch) for epoch in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert all(sorted(indices) == list(range(50)) for indices in first)
    assert len({tuple(indices) for indices in first}) == 3
    assert order(ResumableSampler(50, shuffle=True, seed=2), 0) not in first
    assert order(ResumableSampler(5, shuffle=False, seed=1), 3) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("position", [0, 1, 8, 13, 16, 50])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_epoch_goes_on_exactly(position: int, world_size: int) -> None:
    for rank in range(world_size):
        straight = ResumableSampler(48, shuffle=True, seed=3, rank=rank, world_size=world_size)
        whole = order(straight, 2)
        resumed = ResumableSampler(48, shuffle=True, seed=3, rank=rank, world_size=world_size)
        resumed.skip(position)
        assert order(resumed, 2) == whole[position:]  # the epoch is set after the skip, as Lightning does
        assert len(resumed) == len(whole)
        assert order(resumed, 3) == order(straight, 3)  # once


def test_a_resumed_loader_gives_the_same_batches() -> None:
    def batches(skip: int) -> list[list[int]]:
        sampler = ResumableSampler(22, shuffle=True, seed=5)
        sampler.skip(skip)
        return [batch.tolist() for batch in DataLoader(range(22), batch_size=4, sampler=sampler)]  # type: ignore[arg-type]

    assert batches(8) == batches(0)[2:]


@pytest.mark.parametrize("num_samples", [0, 1, 2, 7, 9])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_epoch(num_samples: int, world_size: int) -> None:
    padded = [ResumableSampler(num_samples, shuffle=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(sampler) for sampler in padded}) == 1
    assert {index for sampler in padded for index in order(sampler)} == set(range(num_samples))
    exact = [ResumableSampler(num_samples, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for sampler in exact for index in order(sampler)) == list(range(num_samples))
    assert all(len(sampler) == len(order(sampler)) for sampler in padded + exact)


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="rank"):
        ResumableSampler(5, shuffle=True, rank=2, world_size=2)
    with pytest.raises(ValueError, match="negative"):
        ResumableSampler(-5, shuffle=True)
    with pytest.raises(ValueError, match="cannot skip -1"):
        ResumableSampler(5, shuffle=True).skip(-1)
