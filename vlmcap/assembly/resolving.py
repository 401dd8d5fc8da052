"""What a configuration leaves to its data and its checkpoints, decided once: prompt, lengths of captions and licenses.

Decided values take the places of `auto` in the configuration, so that the run's files and checkpoints hold them, and
evaluation and captioning need no data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.assembly.components import load_prompt_of
from vlmcap.config import AUTO, ENGLISH_PROMPT, KOREAN_PROMPT, UNKNOWN, Config, CustomVlmConfig, PretrainedVlmConfig
from vlmcap.config.kinds import SCHEMAS
from vlmcap.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlmcap.types import Clip

_STEP = 32  # tokens; limits are multiples of it, so that a few more clips rarely change them
_READ = 1_000  # captions of each split that say which language the data has
_COUNTED = ("train", "val")  # splits whose captions decide; the test split decides nothing unless it is all there is


def resolve(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Config:
    """The configuration with its `auto` values decided by the data, and the licenses that the checkpoints' folders state.

    Args:
        config: Run configuration, whose demo data and parts are made.
        clips: Split name to clips; training and validation clips count, or all where there are neither.

    Raises:
        UserError: The language model's tokenizer is not there.
    """
    return _with_licenses(resolve_from_data(config, clips))


def with_model_kind(config: Config) -> Config:
    """The configuration with the class of `model=custom`, which the checkpoint's `config.json` says.

    Raises:
        UserError: The checkpoint is not there, or of a class that is not taken as a whole.
    """
    model = config.model
    if not isinstance(model, CustomVlmConfig):
        return config
    from vlmcap.models.checkpoint import locate_description
    from vlmcap.models.encoders.tower import read_config

    folder = locate_description(model.checkpoint, model.revision, key="model.checkpoint", gate=model.gate)
    found = str(read_config(folder).get("model_type"))
    kinds = {
        kind: schema
        for kind, schema in SCHEMAS["model"].items()
        if issubclass(schema, PretrainedVlmConfig) and kind != model.kind
    }
    if found not in kinds:
        raise UserError(
            f"model.checkpoint={model.checkpoint} is of the type {found}, and model=custom takes {', '.join(kinds)}; "
            "join its parts by encoder=custom and llm=custom"
        )
    values = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(PretrainedVlmConfig)
        if field.name != "kind"
    }
    return dataclasses.replace(config, model=kinds[found](**values))


def resolve_from_data(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Config:
    """The configuration with its `auto` values decided by the data.

    Args:
        config: As for `resolve`, as are the others.
        clips: Split name to clips.

    Raises:
        UserError: The language model's tokenizer is not there.
    """
    counted = [clips[split] for split in _COUNTED if split in clips] or list(clips.values())
    decided: dict[str, Any] = {}
    if config.llm.prompt == AUTO:
        decided["prompt"] = KOREAN_PROMPT if _is_korean(counted) else ENGLISH_PROMPT
    if names := [name for name in ("max_caption_tokens", "max_new_tokens") if getattr(config.llm, name) == AUTO]:
        decided |= dict.fromkeys(names, token_limit(longest_caption(config, counted)))
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, **decided))


def _is_korean(splits: Sequence[Sequence[Clip]]) -> bool:
    """Whether captions are mainly Hangul, by some that are spread over each split."""
    from vlmcap.data.text import is_mainly_hangul

    chosen = (clips[place] for clips in splits for place in range(0, len(clips), max(1, len(clips) // _READ)))
    return is_mainly_hangul(clip.captions[0] for clip in chosen if clip.captions)


def token_limit(longest: int) -> int:
    """The limit that suits a longest caption, in tokens with the end token."""
    return max(1, -(-longest // _STEP)) * _STEP


def longest_caption(config: Config, splits: Sequence[Sequence[Clip]]) -> int:
    """Tokens of the longest caption with its end token."""
    return max((int(lengths.max()) for lengths in caption_counts(config, splits) if len(lengths)), default=0)


def caption_counts(config: Config, splits: Sequence[Sequence[Clip]]) -> list[NDArray[np.int32]]:
    """Tokens of each caption with its end token, by split.

    Counted once for each set of captions and tokenizer, and remembered.

    Raises:
        UserError: The language model's tokenizer is not there.
    """
    from vlmcap.data.loading.lengths import caption_lengths
    from vlmcap.models.checkpoint import fingerprint

    part = "model" if config.is_pretrained_vlm else "llm"
    folder = _folder(config, part)
    prompt = load_prompt_of(config, folder)
    sha256 = fingerprint(folder, getattr(config, part).checkpoint, has_weights=False).sha256
    memo = Path(config.paths.cache_dir) / "manifests"
    fingerprinted = f"{sha256}:{prompt.caption_lead}"
    return [caption_lengths(clips, prompt.encode_caption, folder=memo, fingerprint=fingerprinted) for clips in splits]


def _with_licenses(config: Config) -> Config:
    """The configuration with the licenses of other checkpoints than those that `conf/` knows."""
    from vlmcap.models.llm.inspection import license_of

    changed: dict[str, Any] = {}
    for part in ("model",) if config.is_pretrained_vlm else ("encoder", "llm"):
        settings = getattr(config, part)
        if settings.license == UNKNOWN:
            with suppress(UserError):  # a checkpoint that is not there is reported where its weights are loaded
                changed[part] = dataclasses.replace(settings, license=license_of(_folder(config, part)) or UNKNOWN)
    return dataclasses.replace(config, **changed) if changed else config


def _folder(config: Config, part: str) -> Path:
    from vlmcap.models.checkpoint import locate

    settings = getattr(config, part)
    return locate(
        settings.checkpoint, settings.revision, key=f"{part}.checkpoint", gate=settings.gate, has_weights=False
    )
