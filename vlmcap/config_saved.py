"""Applies overrides to the saved configuration of a checkpoint, for programs that do not train."""

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

# Keys and prefixes of keys that only training reads, with what to do instead.
_TRAINING_ONLY: dict[str, str] = {
    "experiment": "set single values",
    "debug": "set single values",
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
# Exceptions, which other programs read too.
_READ = ("trainer.progress_bar",)
_READ_OF_LORA = tuple(
    f"tuning.lora.{name}" for name in ("rank", "alpha", "target_modules", "use_dora", "use_rslora", "use_experts")
)


def with_overrides(base: dict[str, Any], composed: DictConfig, overrides: Sequence[str]) -> Config:
    """Returns a saved configuration with the values of a command line, which Hydra has parsed and checked.

    Args:
        base: Saved configuration of the checkpoint, as plain data.
        composed: Configuration that Hydra composed, with the types of the schema.
        overrides: Overrides as typed; `data=aihub` replaces a full group, `data.split=test` a single value.

    Raises:
        UserError: A value is wrong, or has no effect in an evaluation.
    """
    return saved_config(base, {**_values(composed, overrides), "paths.output_dir": composed.paths.output_dir})


def override_values(overrides: Sequence[str], *, program: str = "", read: Collection[str] = ()) -> dict[str, Any]:
    """Returns the values of overrides by key, for a saved configuration; `hardware=l4` gives a full group.

    Args:
        overrides: Overrides as typed on the command line.
        program: Name of the program, for error messages.
        read: Keys and groups that the program reads; empty if it reads all.

    Raises:
        UserError: An override has an unknown key or a wrong value, or the program does not read the key.
    """
    if not overrides:
        return {}
    values = _values(compose_node(loosened(overrides), name="evaluate"), overrides)
    for key in values if read else ():
        if not any(_is_within(key, known) for known in read):
            raise UserError(f"{key} has no effect in {program}; leave {key} out")
    return values


def loosened(overrides: Sequence[str]) -> list[str]:
    """Allows keys of any kind in overrides, because only the checkpoint determines the kind of a group."""
    changed = []
    for override in overrides:
        key = key_of(override)
        group, dot, _ = key.partition(".")
        is_open = bool(dot) and group in SCHEMAS and override.startswith(key)
        # "++" adds a key to a group whose composed kind does not have it.
        changed.append(f"++{override}" if is_open else override)
    return changed


def _values(composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    keys = [key for override in overrides if (key := key_of(override)) != "checkpoint"]
    # An experiment is not a key of the composed configuration.
    return {key: composed._get_node(key) if key in composed else OmegaConf.select(composed, key) for key in keys}


def saved_config(
    plain: dict[str, Any], values: Mapping[str, Any] | None = None, *, is_training: bool = False
) -> Config:
    """Returns the configuration of a checkpoint with other values for some keys.

    Saved values that have no effect with the new ones are reset to their defaults.

    Args:
        plain: Saved configuration of the checkpoint, as plain data.
        values: Values by dotted key, or a full group by its name.
        is_training: Whether the configuration is for training; otherwise, keys that only training reads are refused.

    Raises:
        UserError: A value is wrong, or has no effect.
    """
    values = values or {}
    if not is_training:
        _refuse_training_keys(plain, values)
    node = from_plain(plain, values)
    for group in ("model", "encoder", "llm"):
        if f"{group}.checkpoint" in values and f"{group}.revision" not in values and "revision" in node[group]:
            node[group].revision = None  # the saved revision belongs to the saved checkpoint
    while True:  # each round resets one saved value that has no effect with the new ones
        try:
            return to_config(node)
        except UserError as error:
            unread = error.__cause__
            if not isinstance(unread, UnreadError) or any(_is_within(unread.key, key) for key in values):
                raise
            OmegaConf.update(node, unread.key, to_plain(unread.default), merge=False)


def _refuse_training_keys(plain: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises a `UserError` for a key that only training reads, unless it has the value of the checkpoint."""
    # The value is an enum from Hydra, or text.
    is_train_split = getattr(values.get("data.split"), "name", values.get("data.split")) == Split.train.name
    for key, value in values.items():
        training_key = next((known for known in _TRAINING_ONLY if _is_within(key, known)), None)
        is_read = key.startswith((*_READ, *_READ_OF_LORA)) or (key == "data.max_clips" and is_train_split)
        if training_key is None or is_read:
            continue
        saved = _at(plain, key)
        # Choices such as "experiment" are no keys of a configuration, and so cannot be equal to the saved value.
        is_kept = "." in key or key in plain
        if (is_kept and to_plain(value) == saved) or (isinstance(value, DictConfig) and _is_choice(value, saved)):
            continue
        typed = key if isinstance(value, DictConfig) or value is None else f"{key}={as_text(value)}"
        instead = f"{_TRAINING_ONLY[training_key]}, or " if _TRAINING_ONLY[training_key] else ""
        raise UserError(
            f"{typed} has no effect on a checkpoint, because only training reads it; {instead}leave {key} out"
        )


def _is_choice(chosen: DictConfig, saved: Any) -> bool:
    """Returns whether a full group is the group of the checkpoint."""
    key = next((name for name in ("name", "kind", "strategy") if name in chosen), None)
    return key is not None and isinstance(saved, Mapping) and to_plain(chosen[key]) == saved.get(key)


def _at(plain: Mapping[str, Any], key: str) -> Any:
    value: Any = plain
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_within(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")
