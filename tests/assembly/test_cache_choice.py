"""`cache.enabled=auto`: the cheaper way, and the cases in which published measurements disagree."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcap.assembly.cache_choice import CacheCosts, choose_cache, encoder_flops, flops_per_s, training_flops
from vlmcap.terminal import duration, gigabytes, grouped

SLOW = CacheCosts(
    num_clips=2500,
    num_missing=2500,
    num_visits=9000,
    encode_s=0.5,
    decode_s=0.4,
    rest_s=0.2,
    num_workers=4,
    num_bytes=10_000_000,
    free_bytes=10**12,
)
"""A large encoder on a slow GPU."""


def test_a_large_encoder_on_a_slow_gpu_is_cached_and_the_line_says_both_costs() -> None:
    choice = choose_cache(SLOW)
    assert choice.is_on
    assert choice.without_s == pytest.approx(9000 * 0.5)  # the decoding hides behind encoder and language model
    assert choice.with_s == pytest.approx(2500 * (0.5 + 0.02))  # and so does the reading of 20 ms
    assert choice.sentence == (
        "cache.enabled=auto: on, because 9 000 visits to 2 500 clips take about 21.7 min if 25.0 GB of features are "
        "built and read, and 75.0 min of encoding otherwise"
    )


def test_a_small_encoder_on_a_fast_gpu_is_not() -> None:
    """The other published experience: the workers hide the decoding, and building costs more than it saves."""
    fast = dataclasses.replace(SLOW, encode_s=0.007, decode_s=1.2, rest_s=0.2, num_workers=8)
    choice = choose_cache(fast)
    assert not choice.is_on
    assert choice.without_s < choice.with_s
    assert choice.sentence.startswith(
        "cache.enabled=auto: off, because 9 000 visits to 2 500 clips take about 63 s of encoding, and "
    )


def test_reading_that_is_slower_than_encoding_is_never_chosen() -> None:
    choice = choose_cache(
        dataclasses.replace(SLOW, rest_s=0.0, decode_s=0.01, encode_s=0.01, num_missing=0, num_visits=10**6)
    )
    assert not choice.is_on
    assert choice.sentence == "cache.enabled=auto: off, because reading a clip takes 20 ms, and encoding it 10 ms"


def test_one_pass_is_not_worth_building_for_and_what_is_there_is_read() -> None:
    once = dataclasses.replace(SLOW, num_visits=2500)
    assert not choose_cache(once).is_on
    there = choose_cache(dataclasses.replace(once, num_missing=0, num_workers=0))
    assert there.is_on
    assert "25.0 GB of features are read, and" in there.sentence


def test_what_does_not_fit_is_not_built() -> None:
    full = choose_cache(dataclasses.replace(SLOW, free_bytes=27 * 10**9))
    assert not full.is_on
    assert full.sentence == (
        "cache.enabled=auto: off, because the features take 25.0 GB, and the disk has 27.0 GB free"
    ), "a tenth is left"
    assert choose_cache(dataclasses.replace(SLOW, free_bytes=28 * 10**9)).is_on
    assert choose_cache(dataclasses.replace(SLOW, free_bytes=27 * 10**9, num_missing=100)).is_on, (
        "the rest is on the disk already"
    )
    limited = choose_cache(dataclasses.replace(SLOW, max_bytes=24 * 10**9, num_missing=100))
    assert not limited.is_on
    assert "cache.max_gib allows 24.0 GB" in limited.sentence


def test_without_workers_everything_is_waited_for() -> None:
    choice = choose_cache(dataclasses.replace(SLOW, num_workers=0))
    assert choice.without_s == pytest.approx(9000 * 0.9)
    assert choice.with_s == pytest.approx(2500 * 0.92 + 9000 * 0.02)


seconds = st.floats(0, 10)


@given(
    st.builds(
        CacheCosts,
        num_clips=st.just(100),
        num_missing=st.integers(0, 100),
        num_visits=st.integers(0, 10_000),
        encode_s=seconds,
        decode_s=seconds,
        rest_s=seconds,
        num_workers=st.integers(0, 16),
        num_bytes=st.integers(1, 10**9),
        free_bytes=st.integers(0, 10**12),
        max_bytes=st.none() | st.integers(0, 10**12),
    )
)
def test_it_is_only_chosen_where_it_is_cheaper_and_fits(costs: CacheCosts) -> None:
    choice = choose_cache(costs)
    assert min(choice.with_s, choice.without_s) >= 0
    if choice.is_on:
        assert choice.with_s < choice.without_s
        assert costs.num_missing * costs.num_bytes <= costs.free_bytes
        assert costs.max_bytes is None or costs.num_clips * costs.num_bytes <= costs.max_bytes
    assert choice.sentence.startswith(f"cache.enabled=auto: {'on' if choice.is_on else 'off'}, because ")
    more = choose_cache(dataclasses.replace(costs, num_visits=costs.num_visits + 1000))
    assert more.is_on or not choice.is_on, "more epochs never speak against a cache"


def test_speeds_and_arithmetic() -> None:
    assert flops_per_s("t4") < flops_per_s("l4") < flops_per_s("a100") < flops_per_s("h100")
    assert flops_per_s("mine") == flops_per_s("l4")
    assert flops_per_s("cpu", 4) == 2 * flops_per_s("cpu", 2) < flops_per_s("t4")
    assert encoder_flops(10, 3) == 60
    assert training_flops(10, 3, is_checkpointed=True) == 1.5 * training_flops(10, 3, is_checkpointed=False)


def test_numbers_for_people() -> None:
    assert [gigabytes(31.2e9), gigabytes(8.5e6), gigabytes(700), grouped(2300)] == [
        "31.2 GB",
        "8.5 MB",
        "0.7 kB",
        "2 300",
    ]
    assert [duration(each) for each in (7200, 120, 12, 0.02, 0)] == ["2.0 h", "2.0 min", "12 s", "20 ms", "0 s"]
