"""Layers are recomputed only as far as `hardware.activation_budget_gib` requires."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmcap.compose import compose
from vlmcap.errors import UserError
from vlmcap.planning.make_plan import make_plan, num_kept_layers

BASE = ["data.root=unset", "encoder=clip", "llm=qwen3_8b", "hardware=l4", "cache.enabled=true", "data.num_frames=2"]


@pytest.mark.slow
def test_the_budget_is_used_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMCAP_CACHE_DIR", str(tmp_path))
    again = make_plan(compose(BASE))
    budget = again.activations_gib + 3
    config = compose([*BASE, f"hardware.activation_budget_gib={budget}"])
    plan = make_plan(config)
    assert 0 < plan.num_kept < 36
    assert num_kept_layers(config) == plan.num_kept
    assert budget - 1 < plan.activations_gib <= budget  # a layer more would be too much
    assert plan.flops < again.flops
    assert make_plan(compose([*BASE, "hardware.activation_budget_gib=0.1"])).num_kept == 0


def test_without_a_budget_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmcap.planning.estimate.memory_profiler.MemoryProfiler", lambda *_: pytest.fail("planned"))
    assert num_kept_layers(compose(BASE)) == 0
    with pytest.raises(UserError, match=r"hardware\.activation_budget_gib must be above 0"):
        compose([*BASE, "hardware.activation_budget_gib=0"])
