"""Resolves settings that depend on data and checkpoints: the prompt, the length of captions, and licenses.

The resolved values replace `auto` in the configuration, so that the files and checkpoints of a run hold them, and
evaluation and captioning need no training data.
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
_NUM_READ = 1_000  # captions of each split that are read to detect the language
_COUNTED = ("train", "val")  # splits that are used; other splits are used only if these are missing


def resolve(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Config:
    """Resolves `auto` values from the data, and unknown licenses from the folders of the checkpoints.

    Args:
        config: Run configuration, after `prepare`.
        clips: Clips of each split; the training and validation splits are used, or all if both are missing.

    Raises:
        UserError: The tokenizer of the language model does not exist.
    """
    return _with_licenses(resolve_from_data(config, clips))


def with_model_kind(config: Config) -> Config:
    """Resolves `model=custom` to the kind that the checkpoint's `config.json` states.

    Raises:
        UserError: The checkpoint does not exist, or its kind is not supported.
    """
    model = config.model
    if not isinstance(model, CustomVlmConfig):
        return config
    from vlmcap.models.checkpoint import locate_description
    from vlmcap.models.encoders.tower import read_config
    from vlmcap.models.pretrained import family_of

    folder = locate_description(model.checkpoint, model.revision, key="model.checkpoint", gate=model.gate)
    # "custom" becomes a known kind, such as "qwen3_vl", whose schema knows the keys that this family reads.
    schema = SCHEMAS["model"][family_of(read_config(folder).get("model_type")).kind]
    values = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(PretrainedVlmConfig)
        if field.name != "kind"
    }
    return dataclasses.replace(config, model=schema(**values))


def resolve_from_data(config: Config, clips: Mapping[str, Sequence[Clip]]) -> Config:
    """Resolves `auto` values from the data.

    Args:
        config: See `resolve`.
        clips: See `resolve`.

    Raises:
        UserError: The tokenizer of the language model does not exist.
    """
    counted = [clips[split] for split in _COUNTED if split in clips] or list(clips.values())
    # Only fields that are still `auto` are replaced; a value that the user has set stays.
    resolved: dict[str, Any] = {}
    if config.llm.prompt == AUTO:
        resolved["prompt"] = KOREAN_PROMPT if _is_korean(counted) else ENGLISH_PROMPT
    if names := [name for name in ("max_caption_tokens", "max_new_tokens") if getattr(config.llm, name) == AUTO]:
        resolved |= dict.fromkeys(names, token_limit(longest_caption(config, counted)))
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, **resolved))


def _is_korean(splits: Sequence[Sequence[Clip]]) -> bool:
    """Returns whether captions are mainly Hangul, by a sample that is spread over each split."""
    from vlmcap.data.text import is_mainly_hangul

    chosen = (clips[index] for clips in splits for index in range(0, len(clips), max(1, len(clips) // _NUM_READ)))
    return is_mainly_hangul(clip.captions[0] for clip in chosen if clip.captions)


def token_limit(longest: int) -> int:
    """Rounds the length of the longest caption, in tokens with the end token, up to a limit."""
    return max(1, -(-longest // _STEP)) * _STEP  # rounded up to a multiple of _STEP


def longest_caption(config: Config, splits: Sequence[Sequence[Clip]]) -> int:
    """Returns the number of tokens of the longest caption, including its end token."""
    return max((int(lengths.max()) for lengths in caption_counts(config, splits) if len(lengths)), default=0)


def caption_counts(config: Config, splits: Sequence[Sequence[Clip]]) -> list[NDArray[np.int32]]:
    """Returns the number of tokens of each caption with its end token, by split.

    The counts are cached for each set of captions and tokenizer.

    Raises:
        UserError: The tokenizer of the language model does not exist.
    """
    from vlmcap.data.loading.lengths import caption_lengths
    from vlmcap.models.checkpoint import fingerprint

    group = "model" if config.is_pretrained_vlm else "llm"
    folder = _folder(config, group)
    prompt = load_prompt_of(config, folder)
    # Only the tokenizer decides the counts, so weights are neither downloaded nor hashed here.
    sha256 = fingerprint(folder, getattr(config, group).checkpoint, has_weights=False).sha256
    manifests = Path(config.paths.cache_dir) / "manifests"
    # Whitespace before the answer merges with its first token, so it belongs to the key of the counts.
    fingerprinted = f"{sha256}:{prompt.caption_lead}"
    return [
        caption_lengths(clips, prompt.encode_caption, folder=manifests, fingerprint=fingerprinted) for clips in splits
    ]


def _with_licenses(config: Config) -> Config:
    """Fills in the licenses of checkpoints that have no file in `conf/`."""
    from vlmcap.models.llm.inspection import license_of

    changed: dict[str, Any] = {}
    for group in ("model",) if config.is_pretrained_vlm else ("encoder", "llm"):
        settings = getattr(config, group)
        if settings.license == UNKNOWN:
            with suppress(UserError):  # a missing checkpoint is reported when its weights are loaded
                changed[group] = dataclasses.replace(settings, license=license_of(_folder(config, group)) or UNKNOWN)
    return dataclasses.replace(config, **changed) if changed else config


def _folder(config: Config, group: str) -> Path:
    from vlmcap.models.checkpoint import locate

    settings = getattr(config, group)
    return locate(
        settings.checkpoint, settings.revision, key=f"{group}.checkpoint", gate=settings.gate, has_weights=False
    )
