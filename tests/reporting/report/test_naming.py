"""The keys in which runs differ, and the names of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmcap.reporting.report.folders import RunFolder, flatten
from vlmcap.reporting.report.naming import comparable_config, factor_values, find_factors, group_name, short_ids

LLM = {"a": {"name": "a", "max_new_tokens": 768}, "b": {"name": "b", "max_new_tokens": 256}}


def run(config: dict[str, Any], *overrides: str, name: str = "0") -> RunFolder:
    base = {
        "seed": 0,
        "encoder": {"name": "clip"},
        "llm": LLM["a"],
        "data": {"name": "demo", "num_frames": 8},
        "tuning": {"name": "lora"},
    }
    return RunFolder(Path(name), config=flatten(base | config), overrides=list(overrides))


def test_groups_replace_the_keys_that_they_determine() -> None:
    runs = [run({}), run({"llm": LLM["b"]}), run({"llm": LLM["b"], "encoder": {"name": "siglip2"}})]
    factors = find_factors(runs)
    assert factors == ["encoder", "llm"]
    assert [group_name(one, factors) for one in runs] == ["clip + a", "clip + b", "siglip2 + b"]
    assert factor_values(runs[2], factors) == {"encoder": "siglip2", "llm": "b"}


def test_keys_that_groups_do_not_determine_are_factors() -> None:
    frames = {"name": "demo", "num_frames": 16}
    runs = [run({}), run({"data": frames}), run({"llm": LLM["b"]}), run({"llm": LLM["b"], "data": frames})]
    factors = find_factors(runs)
    assert factors == ["llm", "data.num_frames"]
    assert group_name(runs[3], factors) == "b, num_frames=16"


def test_overrides_are_never_replaced_by_a_group() -> None:
    """With two encoders and two learning rates, either may cause a difference, so both must be shown."""
    first, second = {"optim": {"lr": 1e-4}}, {"optim": {"lr": 2e-4}, "encoder": {"name": "siglip2"}}
    assert find_factors([run(first), run(second)]) == ["encoder"]
    factors = find_factors([run(first, "optim.lr=1e-4"), run(second, "encoder=siglip2", "optim.lr=2e-4")])
    assert factors == ["encoder", "optim.lr"]
    assert group_name(run(second), factors) == "siglip2, lr=0.0002"


def test_seeds_paths_and_loggers_are_ignored() -> None:
    one = run(
        {
            "seed": 1,
            "paths": {"output_dir": "x", "cache_dir": "/c1"},
            "encoder": {"name": "clip", "checkpoint": "/c1/demo/e"},
        }
    )
    two = run(
        {
            "seed": 2,
            "paths": {"output_dir": "y", "cache_dir": "/c2"},
            "encoder": {"name": "clip", "checkpoint": "/c2/demo/e"},
            "logger": {"kind": "wandb"},
        }
    )
    assert find_factors([one, two]) == []
    assert comparable_config(one.config) == comparable_config(two.config)
    assert group_name(one, []) == "clip + a"


def test_keys_are_shortened_as_far_as_they_stay_unique() -> None:
    loras = [{"name": "x", "lora": {"rank": a}, "other": {"rank": b}} for a, b in ((1, 1), (2, 1), (1, 3))]
    runs = [run({"tuning": lora}) for lora in loras]
    factors = find_factors(runs)
    assert factors == ["tuning.lora.rank", "tuning.other.rank"]
    assert group_name(runs[2], factors) == "lora.rank=1, other.rank=3"


def test_a_pretrained_vlm_is_named_without_components() -> None:
    vlm = run({"model": {"name": "qwen2_5_vl_7b"}, "encoder": {"name": "native"}, "llm": {"name": "native"}})
    runs = [run({"model": {"name": "assembled"}}), vlm]
    assert [group_name(one, find_factors(runs)) for one in runs] == ["clip + a", "qwen2_5_vl_7b"]


def test_a_run_without_configuration_is_named_by_its_folder() -> None:
    bare = RunFolder(Path("multirun/7"))
    assert find_factors([bare, run({}), run({"llm": LLM["b"]})]) == ["llm"]
    assert group_name(bare, ["llm"]) == "7"
    assert factor_values(bare, ["llm"]) == {"llm": None}


def test_ids_are_short_and_stable() -> None:
    ids = short_ids(["one", "two", "one"], "r")
    assert len(ids) == 2
    assert ids["one"] == short_ids(["one"], "r")["one"]
    assert len(set(short_ids([str(n) for n in range(2000)], "r").values())) == 2000
