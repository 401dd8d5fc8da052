"""What is known of the data before a run, where it is on this machine: its number of clips and caption lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.resolving import caption_counts, resolve_from_data, with_model_kind
from vlmcap.compose import compose, to_plain
from vlmcap.config import Config, Split
from vlmcap.errors import UserError
from vlmcap.planning.caption_lengths import CaptionLengths

if TYPE_CHECKING:
    from vlmcap.types import Clip


def planned(overrides: Sequence[str]) -> Config:
    """Composes the configuration that a plan is made for, with the settings that its data decides.

    Raises:
        UserError: An override is wrong, or the data cannot be read.
    """
    return with_known_data(with_model_kind(compose(overrides)))


def with_known_data(config: Config) -> Config:
    """Fills in the settings that the data decides, where the data is there; it is read once per process.

    Raises:
        UserError: The data cannot be read.
    """
    if not config.llm.is_length_open or not (clips := known_clips(config)):
        return config
    from vlmcap.planning.estimate.meta_models import cached

    key = ["llm", to_plain(config.llm), to_plain(config.model), _data_key(config)]
    return dataclasses.replace(config, llm=cached(key, lambda: for_plan(config, clips).llm))


def for_plan(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Config:
    """Fills in the settings that the data decides; unchanged without clips, or without the tokenizer on this machine.

    Args:
        config: Run configuration.
        clips: Split name to clips; empty where the data is not there.
    """
    try:
        return resolve_from_data(config, clips) if clips else config
    except UserError:  # a plan is made before anything is downloaded
        return config


def known_captions(config: Config) -> CaptionLengths | None:
    """Returns the lengths of the training captions; None without the data, or without the tokenizer on this machine.

    Args:
        config: Run configuration, as `planned` returns it.

    Raises:
        UserError: The data cannot be read.
    """
    if not (clips := known_clips(config).get("train")):
        return None
    try:
        (counts,) = caption_counts(config, [clips])
    except UserError:  # a plan is made before anything is downloaded
        return None
    return CaptionLengths.of(counts.tolist(), config.llm.caption_tokens) if counts.any() else None


def known_clips(config: Config) -> Mapping[str, Sequence[Clip]]:
    """Returns the clips of each split, read once per process.

    Empty for the demo, which makes its own clips, and where `data.root` does not exist.

    Raises:
        UserError: The data cannot be read.
    """
    if config.data.is_demo or not Path(config.data.root).expanduser().exists():
        return {}
    # Imported here, because it loads all that a plan needs, and a run without a plan does not.
    from vlmcap.planning.estimate.meta_models import cached

    return cached(["clips", _data_key(config)], lambda: load_splits(config, (), tuple(Split)))  # type: ignore[no-any-return]


def _data_key(config: Config) -> list[Any]:
    data = {key: value for key, value in to_plain(config.data).items() if key not in _IRRELEVANT_KEYS}
    return [data, config.paths.cache_dir, config.seed]


# Keys of `data` that change how clips are batched, but not which clips there are.
_IRRELEVANT_KEYS = ("batch_size", "eval_batch_size", "num_frames", "batching", "max_tokens_per_batch", "num_workers")
