"""Each clip once an epoch, in batches that keep their limits; an order of seed and epoch alone.

A position that resumes exactly.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from vlmcap.data.loading.batches import BatchPlan, BatchSampler, Draw, length_plan, packed_plan, shuffled_plan
from vlmcap.errors import UserError

BUDGET = 100
PLANS: dict[str, Callable[[NDArray[np.int64]], BatchPlan]] = {
    "shuffled": lambda lengths: shuffled_plan(len(lengths), 4),
    "by length": lambda lengths: length_plan(lengths, batch_size=4),
    "by length in a budget": lambda lengths: length_plan(lengths, max_tokens=BUDGET),
    "packed": lambda lengths: packed_plan(lengths, BUDGET),
}
LENGTHS = st.lists(st.integers(1, BUDGET), max_size=60).map(lambda lengths: np.array(lengths, dtype=np.int64))


def epoch_of(sampler: BatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert all(at == epoch for batch in batches for at, _ in batch)
    return [[index for _, index in batch] for batch in batches]


def caption_like(count: int) -> NDArray[np.int64]:
    """Lengths of whole sequences.

    Captions of 311 to 708 tokens with 402 on average, a prompt, and 128 visual tokens.
    """
    return np.clip(np.random.default_rng(0).gamma(16, 6, count) + 306, 311, 708).astype(np.int64) + 40 + 128


@settings(deadline=None)
@given(lengths=LENGTHS, kind=st.sampled_from(sorted(PLANS)), world_size=st.integers(1, 5), seed=st.integers(0, 3))
def test_ranks_share_an_epoch(lengths: NDArray[np.int64], kind: str, world_size: int, seed: int) -> None:
    plan = PLANS[kind](lengths)
    ranks = [BatchSampler(plan, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    counts = set()
    for epoch in (0, 1, 7):
        batches = [epoch_of(sampler, epoch) for sampler in ranks]
        counts |= {len(rank_batches) for rank_batches in batches} | {len(sampler) for sampler in ranks}
        every = [batch for rank_batches in batches for batch in rank_batches]
        clips = [index for batch in every for index in batch]
        assert sorted(clips) == list(range(len(lengths))), "each clip once"
        empty = [(step, batch) for rank_batches in batches for step, batch in enumerate(rank_batches) if not batch]
        if empty:  # ranks wait for each other
            assert max(map(len, every)) == 1
            assert len(empty) < world_size and len({step for step, _ in empty}) == 1
        for batch in filter(None, every):
            if kind == "packed":
                assert lengths[batch].sum() <= BUDGET
            elif kind == "by length in a budget":
                assert lengths[batch].max() * len(batch) <= BUDGET
            else:
                assert len(batch) <= 4
    assert len(counts) == 1, "rates need the same number of steps in each epoch and rank"


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_the_order_is_a_function_of_seed_and_epoch(kind: str) -> None:
    plan = PLANS[kind](np.random.default_rng(0).integers(5, 40, 200))
    first = BatchSampler(plan, seed=1)
    epochs = [epoch_of(first, epoch) for epoch in range(3)]
    again = BatchSampler(PLANS[kind](np.random.default_rng(0).integers(5, 40, 200)), seed=1)
    assert [epoch_of(again, epoch) for epoch in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert epoch_of(BatchSampler(plan, seed=2), 0) not in epochs
    companies = [{frozenset(batch) for batch in batches} for batches in epochs]
    assert len(companies[0] & companies[1]) < 0.1 * len(companies[0]), "clips meet others in each epoch"


@pytest.mark.parametrize("kind", sorted(PLANS))
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_epoch_goes_on_exactly(kind: str, world_size: int) -> None:
    plan = PLANS[kind](np.random.default_rng(0).integers(5, 40, 50))
    for rank in range(world_size):
        straight = BatchSampler(plan, seed=3, rank=rank, world_size=world_size)
        whole, after = epoch_of(straight, 2), epoch_of(straight, 3)
        for batches in range(len(whole) + 1):
            resumed = BatchSampler(plan, seed=3, rank=rank, world_size=world_size)
            resumed.load_state_dict(straight.position(2, batches))
            if batches < len(whole):
                assert epoch_of(resumed, 2) == whole[batches:]  # Lightning tells the epoch after the state
                assert len(resumed) == len(whole)
            assert epoch_of(resumed, 3) == after


def test_a_position_belongs_to_its_batches() -> None:
    plan = shuffled_plan(20, 4)
    state = BatchSampler(plan, seed=3).position(2, 1)
    for other in (
        BatchSampler(shuffled_plan(21, 4), seed=3),
        BatchSampler(plan, seed=4),
        BatchSampler(plan, seed=3, world_size=5),
    ):
        with pytest.raises(UserError, match=r"inside an epoch whose batches have changed since; .*data\.batch_size"):
            other.load_state_dict(state)
        other.load_state_dict(BatchSampler(plan, seed=3).position(1, 5))  # at the end of an epoch nothing is left of it
        assert epoch_of(other, 2) == epoch_of(BatchSampler(other.plan, seed=other.seed, world_size=other.world_size), 2)


class Numbers(Dataset[int]):
    def __getitem__(self, key: Draw) -> int:
        return key[0] * 1000 + key[1]


def test_a_position_belongs_to_its_clips() -> None:
    first, other = (BatchSampler(shuffled_plan(20, 4), content=name) for name in ("clips", "other clips"))
    with pytest.raises(UserError):
        other.load_state_dict(first.position(0, 2))
    other.load_state_dict(first.position(1, 0))  # at the start of an epoch any clips do


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_s_state_counts_what_it_gave_and_not_what_it_read_ahead(num_workers: int) -> None:
    def make() -> tuple[BatchSampler, StatefulDataLoader[list[int]]]:
        sampler = BatchSampler(PLANS["by length"](np.arange(1, 51)), seed=3)
        loader: StatefulDataLoader[list[int]] = StatefulDataLoader(
            Numbers(),
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        return sampler, loader

    sampler, loader = make()
    sampler.set_epoch(1)
    batches = iter(loader)
    given = [next(batches) for _ in range(5)]
    state, drawn = loader.state_dict(), sampler.state_dict()["batches"]
    rest = list(batches)
    assert drawn == 5 + 2 * num_workers
    assert len(given) + len(rest) == len(sampler) == 13
    resumed_sampler, resumed = make()
    resumed.load_state_dict(state)
    assert list(resumed) == rest
    for each in (sampler, resumed_sampler):
        each.set_epoch(2)
    assert list(resumed) == list(loader) != given + rest


def test_little_is_padding() -> None:
    lengths = caption_like(4000)

    def padding(plan: BatchPlan) -> float:
        batches = epoch_of(BatchSampler(plan), 0)
        return float(1 - lengths.sum() / sum(lengths[batch].max() * len(batch) for batch in batches))

    assert padding(shuffled_plan(4000, 8)) > 0.05
    assert padding(length_plan(lengths, batch_size=8)) < 0.005
    assert padding(length_plan(lengths, max_tokens=4096)) < 0.005


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_rows_are_those_of_first_fit_decreasing(lengths: NDArray[np.int64]) -> None:
    descending = -np.sort(-lengths)
    width = max(1, math.isqrt(len(lengths)))
    rows: list[int] = []
    for size in (
        descending[index // width * width] for index in range(len(lengths))
    ):  # each as long as the longest of its bucket
        place = next((row for row, used in enumerate(rows) if used + size <= BUDGET), None)
        if place is None:
            rows.append(size)
        else:
            rows[place] += size
    assert len(packed_plan(lengths, BUDGET)) == len(rows)


def test_rows_are_filled() -> None:
    assert len(packed_plan(np.array([6, 4] * 50), 10)) == 50
    lengths = caption_like(4000)
    assert lengths.sum() / (len(packed_plan(lengths, 4096)) * 4096) > 0.94
    assert lengths.sum() / (len(length_plan(lengths, max_tokens=4096)) * 4096) > 0.9


def test_ranks_get_batches_of_like_length_at_the_same_time() -> None:
    lengths = caption_like(4000)
    ranks = [
        epoch_of(BatchSampler(length_plan(lengths, batch_size=8), rank=rank, world_size=4), 0) for rank in range(4)
    ]
    longest = np.array([[lengths[batch].max() for batch in batches] for batches in ranks])
    assert np.median(np.ptp(longest, axis=0)) < 0.1 * np.ptp(longest)


def test_memory_is_flat() -> None:
    count = 100_000
    lengths = caption_like(count)
    tracemalloc.start()
    sampler = BatchSampler(packed_plan(lengths, 4096))
    for _ in zip(range(100), sampler, strict=False):
        pass
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 48 * count
    assert peak < 100 * count


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_impossible_settings(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="seed must not be negative and rank"):
        BatchSampler(shuffled_plan(5, 2), **arguments)


@pytest.mark.parametrize("kind", sorted(PLANS))
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("num_clips", [1, 2, 3, 5, 7, 8, 9, 16, 17, 24])
def test_no_clip_comes_twice_and_every_optimiser_step_has_one(
    kind: str, num_clips: int, world_size: int, accumulation: int
) -> None:
    plan = PLANS[kind](np.random.default_rng(num_clips).integers(5, 40, num_clips))
    for chosen in (plan, shuffled_plan(num_clips, 1), shuffled_plan(num_clips, num_clips + 1)):
        ranks = [BatchSampler(chosen, rank=rank, world_size=world_size) for rank in range(world_size)]
        for epoch in range(3):
            steps = list(zip(*(epoch_of(sampler, epoch) for sampler in ranks), strict=True))
            assert len(steps) == len(ranks[0])
            assert sorted(index for step in steps for batch in step for index in batch) == list(range(num_clips))
            for start in range(0, len(steps), accumulation):
                assert any(batch for step in steps[start : start + accumulation] for batch in step)
            assert len(steps) == 1 or all(steps[0]), "an empty batch is never a rank's first"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_empty_batch_passes_the_loader(num_workers: int) -> None:
    samplers = [BatchSampler(shuffled_plan(3, 1), rank=rank, world_size=2) for rank in range(2)]
    loaders: list[StatefulDataLoader[list[int]]] = [
        StatefulDataLoader(Numbers(), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
        for sampler in samplers
    ]
    batches = [list(loader) for loader in loaders]
    assert [len(rank_batches) for rank_batches in batches] == [2, 2]
    assert sorted(index for rank_batches in batches for batch in rank_batches for index in batch) == [0, 1, 2]
    assert [] in batches[1]
