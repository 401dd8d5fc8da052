"""Rates are a function of the step alone: stages, warm-up and cosine."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcap.config import Stage
from vlmcap.models.rates import cosine_rate
from vlmcap.training.schedule import StagePlan


def two_stages(align: int = 2, tune: int = 3, warmup_ratio: float = 0.0) -> StagePlan:
    return StagePlan(
        {
            "align": Stage(epochs=align, projector_lr=1e-3, warmup_ratio=warmup_ratio),
            "tune": Stage(
                epochs=tune, projector_lr=1e-4, adapter_lr=2e-4, warmup_ratio=warmup_ratio, final_lr_ratio=0.1
            ),
        }
    )


def test_epochs_belong_to_their_stage() -> None:
    plan = two_stages()
    assert plan.num_epochs == 5
    assert [plan.at_epoch(epoch).name for epoch in range(5)] == ["align", "align", "tune", "tune", "tune"]
    assert [plan.at_epoch(epoch).first_epoch for epoch in range(5)] == [0, 0, 2, 2, 2]
    assert plan.at_epoch(9).name == "tune", "the last stage from its end on"


def test_stages_without_epochs_are_passed_over() -> None:
    assert two_stages(align=0).at_epoch(0) == two_stages(align=0).at_epoch(2)
    assert two_stages(align=0).at_epoch(0).name == "tune"
    assert two_stages(tune=0).at_epoch(5).name == "align"
    assert two_stages(tune=0).trained_components() == ("projector",)
    assert two_stages().trained_components() == ("projector", "adapter")


def test_the_align_stage_moves_the_projector_alone() -> None:
    plan = two_stages()
    rates = {part: [plan.rate(part, step, 10) for step in range(50)] for part in ("projector", "adapter", "llm")}
    assert set(rates["adapter"][:20]) == {0.0} == set(rates["llm"])
    assert rates["projector"][0] == 1e-3
    assert rates["projector"][19] < 1e-5
    assert (rates["projector"][20], rates["adapter"][20]) == (1e-4, 2e-4), "each stage has its own peak"
    assert rates["adapter"][49] == pytest.approx(2e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 29 / 30))))


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rates = [two_stages(warmup_ratio=0.2).rate("projector", step, 10) for step in range(20)]
    assert rates[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert all(before > after for before, after in pairwise(rates[4:]))


@given(
    num_steps=st.integers(2, 500),
    share=st.floats(0, 0.9),
    final_ratio=st.floats(0, 1),
    peak=st.floats(1e-6, 1e-1),
)
def test_neighbouring_rates_are_near_and_never_above_the_peak(
    num_steps: int, share: float, final_ratio: float, peak: float
) -> None:
    warmup = min(num_steps - 1, round(share * num_steps))
    rates = [
        cosine_rate(step, num_steps, peak=peak, warmup_steps=warmup, final_ratio=final_ratio)
        for step in range(num_steps + 3)
    ]
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    slope = peak * max(1 / max(1, warmup), math.pi / 2 / max(1, num_steps - warmup))
    assert all(abs(before - after) <= slope * (1 + 1e-6) for before, after in pairwise(rates))
    assert rates[num_steps] == pytest.approx(peak * final_ratio, abs=peak * 1e-9)


@given(step=st.integers(0, 59), steps_per_epoch=st.integers(1, 12))
def test_a_rate_asks_for_nothing_but_the_step(step: int, steps_per_epoch: int) -> None:
    plan = two_stages(warmup_ratio=0.1)
    alone = plan.rate("projector", step, steps_per_epoch)
    in_order = [plan.rate("projector", earlier, steps_per_epoch) for earlier in range(step + 1)]
    assert alone == in_order[-1] == two_stages(warmup_ratio=0.1).rate("projector", step, steps_per_epoch)
