"""Checks every encoder with every projector and every language model, and every pretrained VLM, by shapes alone.

    python -m tools.combinations     check all and write docs/combinations.json, which docs/reference/models.md shows

Nothing is downloaded or allocated. Each combination passes the check that `vlmcap plan` and a run make before they load
weights, or is refused by it in one sentence. Settings are composed as in a run, but only as often as there are names of
the largest group, and put together for each combination, because composing each of thousands would take an hour.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tools.model_tables import markdown_table
from vlmcap.compose import CUSTOM, compose
from vlmcap.config import Config, LinearConfig, TuningConfig
from vlmcap.config_files import group_choices
from vlmcap.config_unread import NO_DATA
from vlmcap.demo.prepare import TINY_ENCODERS
from vlmcap.errors import UserError
from vlmcap.planning.estimate.sizes import clip_sizes

CHECKED = Path(__file__).resolve().parents[1] / "docs" / "combinations.json"
PARTS = ("encoder", "projector", "llm")
# Without a checkpoint of their own, or made by the demo on first use.
_UNPUBLISHED = ("native", CUSTOM, "assembled", *TINY_ENCODERS)


def published(group: str) -> list[str]:
    """Returns the names of a group that have a published checkpoint, or are projectors."""
    return [name for name in group_choices(group) if name not in _UNPUBLISHED]


def combination(encoder: str, projector: str, llm: str) -> Config:
    """Returns the configuration of `encoder=… projector=… llm=… hardware=l4`, put together by parts."""
    found = _parts()
    settings, language = found["projector"][projector], found["llm"][llm]
    if isinstance(settings, LinearConfig):  # its default reducer follows the language model
        settings = dataclasses.replace(settings, reducer=language.suggested.reducer)
    parts = {"encoder": found["encoder"][encoder], "projector": settings, "llm": language}
    return dataclasses.replace(found["common"], **parts, tuning=_tuning(llm))


@cache
def _parts() -> dict[str, Any]:
    """Returns the settings of each part by group and name, and a configuration with those that are common to all."""
    names = {group: published(group) for group in PARTS}
    configs = [
        compose([*(f"{group}={names[group][turn % len(names[group])]}" for group in PARTS), "hardware=l4"])
        for turn in range(max(map(len, names.values())))
    ]
    parts = {group: {getattr(config, group).name: getattr(config, group) for config in configs} for group in PARTS}
    return parts | {"common": configs[0]}


@cache
def _tuning(llm: str) -> TuningConfig:
    """Returns the settings of training, whose learning rates follow the language model."""
    suggested, tuning = _parts()["llm"][llm].suggested, _parts()["common"].tuning
    rates = {name: getattr(suggested, name) for name in ("align_lr", "projector_lr", "adapter_lr")}
    return dataclasses.replace(tuning, **rates)


def refusal(config: Config) -> str:
    """Returns why the parts of a configuration do not fit together, in one sentence; empty if they do."""
    try:
        clip_sizes(config)
    except UserError as error:
        return str(error)
    return ""


def refusals(encoder: str) -> Iterator[tuple[str, str, str]]:
    """Yields projector, language model and sentence of each combination with an encoder that is refused."""
    for projector, llm in itertools.product(published("projector"), published("llm")):
        if reason := refusal(combination(encoder, projector, llm)):
            yield projector, llm, reason


def check_all() -> dict[str, Any]:
    """Checks all combinations and all pretrained VLMs; returns the content of docs/combinations.json."""
    counts = {group: len(published(group)) for group in PARTS}
    refused = []
    for encoder in published("encoder"):
        by_reason = Counter((projector, reason) for projector, _, reason in refusals(encoder))
        refused += [
            {"encoder": encoder, "projector": projector, "llms": count, "reason": reason}
            for (projector, reason), count in by_reason.items()
        ]
    return {"counts": counts, "refused": refused, "models": {name: check_model(name) for name in published("model")}}


def check_model(name: str) -> dict[str, Any]:
    """Returns the visual tokens of a clip of a pretrained VLM, and why it is refused; empty if it is not."""
    config = compose([f"model={name}", NO_DATA, "hardware=l4"])
    try:
        return {"visual_tokens": clip_sizes(config).num_visual, "reason": ""}
    except UserError as error:
        return {"visual_tokens": None, "reason": str(error)}


def section(checked: Mapping[str, Any]) -> str:
    """Returns the section of docs/reference/models.md.

    Args:
        checked: Content of docs/combinations.json.
    """
    counts, models, refused = checked["counts"], checked["models"], checked["refused"]
    total, num_refused = math.prod(counts.values()), sum(row["llms"] for row in refused)
    fit = sum(not row["reason"] for row in models.values())
    rows = [(f"`{row['encoder']}`", f"`{row['projector']}`", str(row["llms"]), row["reason"]) for row in refused]
    rows += [(f"`model={name}`", "", "", row["reason"]) for name, row in models.items() if row["reason"]]
    return (
        f"## Combinations\n\n`python -m tools.combinations` checks all {counts['encoder']} encoders × "
        f"{counts['projector']} projectors × {counts['llm']} language models with `hardware=l4`, by the check "
        "that `vlmcap plan` makes before a download and a run before it loads weights. Whether "
        f"they fit into the memory of a GPU is what `vlmcap plan` says. {total - num_refused} of {total} combinations "
        f"and {fit} of {len(models)} pretrained VLMs fit together; {num_refused} combinations are refused:\n\n"
        f"{markdown_table(('encoder', 'projector', 'language models', 'the sentence'), rows)}"
    )


def main() -> int:
    """Checks all and writes the file; returns the exit code."""
    CHECKED.write_text(json.dumps(check_all(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
