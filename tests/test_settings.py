"""No setting is accepted that has no effect.

Every key of every group is refused by name, or read by what a user runs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

from tests.thinned import thinned
from vlmcap.compose import compose, compose_node, to_config
from vlmcap.config import Config
from vlmcap.config.kinds import SCHEMAS
from vlmcap.errors import UserError
from vlmcap.planning.make_plan import make_plan
from vlmcap.training.run import train

MakeConfig = Callable[..., Config]
_NOT_READERS = (
    "vlmcap.config.checks",
    "vlmcap.config.unread",
    "vlmcap.compose",
    "dataclasses",
    "copy",
    "omegaconf",
    "tests.",
)
_CHECKS = ("__post_init__", "_check", "check")  # beginnings of the functions that read a value to check it alone


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """Dotted key, dataclass and field of every value below a configuration."""
    for known in dataclasses.fields(values):
        value, key = getattr(values, known.name), f"{prefix}{known.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from leaves(value, f"{key}.")
        elif key != "encoder.join":  # a second encoder, which is refused on the command line
            yield key, type(values), known.name


NODE = compose_node([])
DEFAULT = to_config(NODE)
KEYS = [*leaves(DEFAULT)]
# What another value is, where one more, the next choice or another word would not be one.
OTHER = {
    "data.batching": "by_length",
    "data.split": "val",
    "data.root": "elsewhere",
    "data.splits.random": "true",
    "evaluation.engine": "hf",
    "evaluation.tokenizer": "char",
    "evaluation.siglip_checkpoint": "some/model",
    "evaluation.bert_checkpoint": "some/model",
    "evaluation.facts": "facts.json",
    "evaluation.synonyms": "synonyms.json",
    "hardware.accelerator": "gpu",
    "encoder.image_mean": "[0.5, 0.5, 0.4]",
    "encoder.image_std": "[0.5, 0.5, 0.4]",
    "hardware.gradient_checkpointing": "true",
    "llm.attention": "eager",
    "monitor": "val/loss",
    "mode": "min",
    "projector.checkpoint": "some/projector",
    "tuning.encoder": "none",  # with the cache of the tiny encoder, any other is refused
    "callbacks.extra": "[{_target_: lightning.pytorch.callbacks.DeviceStatsMonitor}]",
}


def other(key: str, owner: type, name: str, value: Any) -> str:
    """Another value of the key, as YAML has it."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, Enum):
        members = [*type(value)]
        return str(members[(members.index(value) + 1) % len(members)].name)
    if isinstance(value, int | float):
        return str(value * 2 or 0.25 if isinstance(value, float) else value + 1)
    kind = str(get_type_hints(owner)[name])
    return "3" if value is None and ("int" in kind or "float" in kind) else "other"


def at(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def with_value(key: str, value: str) -> Config:
    """The default configuration with one value changed, as an override changes it.

    Composing anew takes a third of a second.
    """
    node = NODE.copy()
    OmegaConf.update(node, key, yaml.safe_load(value))
    return to_config(node)


@contextmanager
def recorded_reads() -> Iterator[set[tuple[str, str]]]:
    """The fields that code outside of the configuration itself reads meanwhile, as (dataclass, field)."""
    reads: set[tuple[str, str]] = set()

    def recording(values: Any, name: str) -> Any:
        frame = sys._getframe(1)
        is_reader = not frame.f_globals.get("__name__", "").startswith(_NOT_READERS)
        if is_reader and not frame.f_code.co_name.startswith(_CHECKS):
            reads.add((type(values).__name__, name))
        return object.__getattribute__(values, name)

    classes = {owner for _, owner, _ in KEYS}
    with pytest.MonkeyPatch.context() as patch:
        for owner in classes:
            patch.setattr(owner, "__getattribute__", recording, raising=False)
        yield reads


@pytest.fixture(scope="module")
def reads(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """What a short run of the demo and its plan read."""
    folder = tmp_path_factory.mktemp("settings")
    config = tiny_config(folder / "run", "trainer.max_steps=1")
    with recorded_reads() as found:
        train(config)
        make_plan(config)
    return found


@pytest.mark.parametrize(("key", "owner", "name"), KEYS, ids=[key for key, _, _ in KEYS])
def test_a_setting_is_read_or_refused(key: str, owner: type, name: str, reads: set[tuple[str, str]]) -> None:
    try:
        changed = with_value(key, other(key, owner, name, at(DEFAULT, key)))
    except UserError as refusal:
        assert key in str(refusal) or key.split(".")[-1] in str(refusal)
        return
    # Others may follow it: `hardware.batch_size` changes `data.batch_size`.
    differing = [one for one in KEYS if one[0] == key or at(changed, one[0]) != at(DEFAULT, one[0])]
    is_read = any((owner.__name__, name) in reads for _, owner, name in differing)
    assert is_read or key in READ_ELSEWHERE, f"{key} is accepted, and nothing reads it"


# Read by other programs than a training run and its plan, or to begin one: who does, and the test that shows it.
READ_ELSEWHERE = {
    "model.name": "names a run",
    "encoder.license": "stands in a run's records",
    "llm.license": "stands in a run's records",
    "data.split": "evaluate.py; train.py refuses it",
    "sweep.budget_h": "vlmcap plan -m",
    "sweep.folder": "train.py -m; train.py alone refuses it",
}


def test_the_count_of_keys() -> None:
    """What is checked above; tests/test_config_unread.py goes over the kinds that are no default."""
    assert len(KEYS) > 150
    assert len({key for key, _, _ in KEYS}) == len(KEYS)


def foreign_keys() -> list[tuple[str, str]]:
    """Every key that some kind of a group has and the default one has not."""
    found = []
    for group, kinds in SCHEMAS.items():
        common = {known.name for known in dataclasses.fields(getattr(DEFAULT, group))}
        found += [
            (group, name)
            for name in sorted({known.name for kind in kinds.values() for known in dataclasses.fields(kind)} - common)
        ]
    return found


def is_first_of_group(key: tuple[str, str]) -> bool:
    return key == next(one for one in foreign_keys() if one[0] == key[0])


@pytest.mark.parametrize(("group", "name"), thinned(foreign_keys(), is_first_of_group))
def test_a_key_of_another_kind_is_refused_by_name(group: str, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"'{name}' is not a key of this {group}, only of {group}=|no key '{group}.{name}' here"
    ):
        compose([f"{group}.{name}=1"])


def test_a_sweep_over_a_key_that_a_part_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'num_queries' is not a key of this projector, only of projector=c_abstractor"
    ):
        compose(["projector=mlp", "projector.num_queries=64"])
