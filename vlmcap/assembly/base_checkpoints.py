"""Finds the base checkpoints of a run: of its one or two encoders and its language model, or of a pretrained VLM."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcap.config import Config, PatchEncoderConfig
from vlmcap.config.kinds import maker_of

if TYPE_CHECKING:
    from vlmcap.models.checkpoint import Fingerprint

ENCODER_KEYS = ("encoder", "encoder.join")  # of the base checkpoints of one encoder, or of two that are joined


@dataclass(frozen=True, slots=True)
class BaseCheckpoints:
    """The frozen base checkpoints of a model.

    Attributes:
        folders: Local folders, by `ENCODER_KEYS` and `llm`, or by `model` for a pretrained VLM.
        fingerprints: Fingerprints of their content, by the same keys.
    """

    folders: dict[str, Path]
    fingerprints: dict[str, Fingerprint]


def locate_base_checkpoints(config: Config, *, is_encoder_only: bool = False) -> BaseCheckpoints:
    """Finds the base checkpoints and computes their fingerprints.

    Args:
        config: Run configuration.
        is_encoder_only: Whether to skip the language model of an assembled model.

    Raises:
        UserError: A checkpoint does not exist.
    """
    from vlmcap.models.checkpoint import VISION, Fingerprint, fingerprint, locate

    # Hashing tens of gigabytes takes minutes, so hashes are cached by path, size and time of change.
    hash_file = Path(config.paths.cache_dir) / "fingerprints.json"
    folders: dict[str, Path] = {}
    fingerprints: dict[str, Fingerprint] = {}
    settings_of: dict[str, Any] = {"model": config.model}
    if not config.is_pretrained_vlm:
        # `zip` stops after one of the two keys if the encoder is not joined with another.
        encoders = [one.encoder for one in encoder_configs(config)]
        settings_of = dict(zip(ENCODER_KEYS, encoders, strict=False)) | ({} if is_encoder_only else {"llm": config.llm})
    for group, settings in settings_of.items():
        # Of a checkpoint that also holds other components, such as CLIP's text model, only the vision files are read.
        wanted = VISION if group in ENCODER_KEYS else None
        if group == "encoder" and has_plugin_encoder(config):
            if not settings.checkpoint:
                # A plugin without a checkpoint has no file to hash, so its kind stands for it.
                sha256 = hashlib.sha256(settings.kind.encode()).hexdigest()
                folders[group], fingerprints[group] = Path(), Fingerprint(settings.kind, "", sha256)
                continue
            # The names of a plugin's tensors are unknown, so no file can be left out.
            wanted = None
        folders[group] = locate(
            settings.checkpoint, settings.revision, key=f"{group}.checkpoint", gate=settings.gate, tensor_filter=wanted
        )
        fingerprints[group] = fingerprint(folders[group], settings.checkpoint, hash_file, wanted)
    return BaseCheckpoints(folders, fingerprints)


def encoder_configs(config: Config) -> tuple[Config, ...]:
    """Returns a configuration of each encoder: two if they are joined, else this one."""
    first = config.encoder
    if not isinstance(first, PatchEncoderConfig) or first.join is None:
        return (config,)
    # `join` has the fields of an encoder but not its class, so it becomes one.
    second = PatchEncoderConfig(**vars(first.join))
    encoders = (dataclasses.replace(first, join=None), second)
    return tuple(dataclasses.replace(config, encoder=encoder) for encoder in encoders)


def vision_component(config: Config) -> str:
    """Returns the key of the base checkpoint that contains the vision encoder."""
    return "model" if config.is_pretrained_vlm else "encoder"


def has_plugin_encoder(config: Config) -> bool:
    """Returns whether the encoder comes from a plugin."""
    return maker_of("encoder", config.encoder.kind) is not None
