"""A saved configuration with the values of a command line over it, for programs that train nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmcap.compose import compose_node, from_plain, to_config, to_plain
from vlmcap.config import Config, Split
from vlmcap.config.checks import as_text
from vlmcap.config.kinds import SCHEMAS
from vlmcap.config.unread import UnreadError
from vlmcap.errors import UserError
from vlmcap.overrides import key_of

# Keys, and beginnings of keys, that only training reads, and what to set in their place.
_OF_TRAINING: dict[str, str] = {
    "experiment": "give single values",
    "debug": "give single values",
    "optim": "",
    "sweep": "",
    "launcher": "",
    "plan": "",
    "tuning": "",
    "monitor": "",
    "mode": "",
    "projector.checkpoint": "",
    "paths.overwrite": "",
    "data.batch_size": "set data.eval_batch_size",
    "data.batching": "",
    "data.max_tokens_per_batch": "",
    "data.augment": "",
    "data.max_clips": "set evaluation.max_final_clips",
    "evaluation.every_n_epochs": "",
    "evaluation.max_clips": "set evaluation.max_final_clips",
    "trainer": "",
    "callbacks.profile": "",
    "callbacks.early_stopping": "",
    "callbacks.guard": "",
    "callbacks.extra": "",
    "hardware.devices": "",
    "hardware.memory_gib": "",
    "hardware.num_frames": "set data.num_frames",
    "hardware.batch_size": "set data.eval_batch_size",
    "hardware.accumulate_grad_batches": "",
    "hardware.image_size": "set encoder.image_size",
    "hardware.frame_stack": "set projector.frame_stack",
    "hardware.quantization": "set llm.quantization",
    "hardware.num_workers": "set data.num_workers",
    "hardware.gradient_checkpointing": "",
    "hardware.activation_budget_gib": "",
    "hardware.offload_checkpoints": "",
}
# What others read of those, below them.
_READ = ("trainer.progress_bar",)
_READ_OF_LORA = tuple(
    f"tuning.lora.{name}" for name in ("rank", "alpha", "target_modules", "use_dora", "use_rslora", "use_experts")
)


def with_overrides(base: dict[str, Any], composed: DictConfig, overrides: Sequence[str]) -> Config:
    """A saved configuration with the values that a command line gave, taken from where Hydra parsed and checked them.

    Args:
        base: Of the checkpoint.
        composed: What Hydra composed, with the schema's types.
        overrides: As given: `data=aihub` takes the whole group, `data.split=test` one value.

    Raises:
        UserError: A value is wrong, or changes nothing in an evaluation.
    """
    return saved_config(base, {**_values(composed, overrides), "paths.output_dir": composed.paths.output_dir})


def override_values(overrides: Sequence[str], *, program: str = "", read: Collection[str] = ()) -> dict[str, Any]:
    """Keys to the values that overrides give them, for a saved configuration.

    A name such as `hardware=l4` is a whole group.

    Args:
        overrides: As typed.
        program: That takes them, for the error.
        read: The keys, and groups of keys, that it reads; all where there are none.

    Raises:
        UserError: An override names what is not there, has a wrong value, or is of a key that the program does not
            read.
    """
    if not overrides:
        return {}
    values = _values(compose_node(loosened(overrides), name="evaluate"), overrides)
    for key in values if read else ():
        if not any(_is_within(key, known) for known in read):
            raise UserError(f"{key} changes nothing in {program}; leave {key} out")
    return values


def loosened(overrides: Sequence[str]) -> list[str]:
    """The overrides with keys that some kind of their group has made possible for any.

    Which kind it is, the checkpoint will say.
    """
    found = []
    for override in overrides:
        key = key_of(override)
        group, dot, _ = key.partition(".")
        is_open = bool(dot) and group in SCHEMAS and override.startswith(key)
        found.append(f"++{override}" if is_open else override)
    return found


def _values(composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    keys = [key for override in overrides if (key := key_of(override)) != "checkpoint"]
    # An experiment is no key of what it composes.
    return {key: composed._get_node(key) if key in composed else OmegaConf.select(composed, key) for key in keys}


def saved_config(
    plain: dict[str, Any], values: Mapping[str, Any] | None = None, *, is_training: bool = False
) -> Config:
    """The configuration of a checkpoint with other values for some keys.

    What the checkpoint has set and what is read no more beside these values is as if it had not been set.

    Args:
        plain: Of the checkpoint.
        values: By dotted key; a whole group by its name.
        is_training: Whether the configuration is to be trained; otherwise keys are refused that only training reads.

    Raises:
        UserError: A value is wrong, or changes nothing.
    """
    values = values or {}
    if not is_training:
        _refuse_of_training(plain, values)
    node = from_plain(plain, values)
    for part in ("model", "encoder", "llm"):
        if f"{part}.checkpoint" in values and f"{part}.revision" not in values and "revision" in node[part]:
            node[part].revision = None  # that of the hub, where the checkpoint was
    while True:
        try:
            return to_config(node)
        except UserError as error:
            unread = error.__cause__
            if not isinstance(unread, UnreadError) or any(_is_within(unread.key, key) for key in values):
                raise
            OmegaConf.update(node, unread.key, to_plain(unread.default), merge=False)


def _refuse_of_training(plain: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """`UserError` for a key that only training reads, unless it has the checkpoint's value."""
    is_train_split = getattr(values.get("data.split"), "name", values.get("data.split")) == Split.train.name
    for key, value in values.items():
        found = next((known for known in _OF_TRAINING if _is_within(key, known)), None)
        is_read = key.startswith((*_READ, *_READ_OF_LORA)) or (key == "data.max_clips" and is_train_split)
        if found is None or is_read:
            continue
        saved = _at(plain, key)
        is_kept = "." in key or key in plain
        if (is_kept and to_plain(value) == saved) or (isinstance(value, DictConfig) and _is_choice(value, saved)):
            continue
        typed = key if isinstance(value, DictConfig) or value is None else f"{key}={as_text(value)}"
        instead = f"{_OF_TRAINING[found]}, or " if _OF_TRAINING[found] else ""
        raise UserError(f"{typed} changes nothing of a checkpoint, as only training reads it; {instead}leave {key} out")


def _is_choice(chosen: DictConfig, saved: Any) -> bool:
    """Whether a whole group is the one that the checkpoint has."""
    told_apart = next((name for name in ("name", "kind", "strategy") if name in chosen), None)
    return (
        told_apart is not None and isinstance(saved, Mapping) and to_plain(chosen[told_apart]) == saved.get(told_apart)
    )


def _at(plain: Mapping[str, Any], key: str) -> Any:
    value: Any = plain
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_within(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")
