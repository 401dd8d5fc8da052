"""`vlmcap cache`: builds, lists, verifies and prunes the features of frozen encoders on disk."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from vlmcap.assembly.base_checkpoints import locate_base_checkpoints
from vlmcap.assembly.clips import load_splits
from vlmcap.assembly.components import device_of, load_encoder
from vlmcap.assembly.datasets import FeaturePlan, grid_of_frames
from vlmcap.assembly.features import features_folder, fill_store, hash_cache, hash_clips, open_store, plans_of
from vlmcap.assembly.resolving import with_model_kind
from vlmcap.compose import compose
from vlmcap.config import Split
from vlmcap.data.features.content_hash import UNREADABLE
from vlmcap.data.features.eviction import StoreInfo, list_stores, remove_store
from vlmcap.data.features.eviction import prune as prune_stores
from vlmcap.data.features.store import FeatureStore
from vlmcap.data.features.verification import verify_stores
from vlmcap.demo.prepare import prepare
from vlmcap.libraries import silence_libraries
from vlmcap.terminal import gigabytes, grouped, progress_reporter, wide_console
from vlmcap.types import Clip

_COLUMNS = ("key", "encoder", "layer", "frames", "clips", "size", "last used", "dtype", "error (RMS)", "error (max)")


def run(options: Namespace) -> None:
    """Runs the action named by `options.action`.

    Raises:
        UserError: An override is invalid, or the store does not exist.
    """
    if options.action == "build":
        build(options.overrides)
    elif options.action == "info":
        info(options.overrides)
    elif options.action == "verify":
        verify(options.overrides)
    else:
        prune(options.overrides, max_gib=options.max_gib, key=options.key)


def build(overrides: Sequence[str]) -> None:
    """Encodes every clip of a configuration that is not in its feature store yet.

    Neither the language model nor its files are needed.

    Args:
        overrides: Overrides as for train.py.

    Raises:
        UserError: The configuration is invalid, or its encoder or its data cannot be used.
    """
    # The command asks for features, whatever `cache.enabled` is in the configuration.
    config = with_model_kind(compose([*overrides, "cache.enabled=true"]))
    # Raises before anything is read, if the GPU is missing.
    device_of(config)
    silence_libraries()
    config = prepare(config)
    # No split is required; whatever exists is encoded.
    clips = load_splits(config, (), tuple(Split))
    # The language model need not be on this machine.
    base_checkpoints = locate_base_checkpoints(config, is_encoder_only=True)
    meta_encoder = load_encoder(config, base_checkpoints.folders, is_meta=True)
    hashes = hash_clips(clips, hash_cache(config))
    for plan in plans_of(FeaturePlan(config, base_checkpoints, meta_encoder, grid_of_frames(config, meta_encoder))):
        store = open_store(plan)
        fill_store(plan, store, clips, hashes)
        bad = [(clip, reason) for split in hashes for clip, reason in unusable(clips[split], hashes[split], store)]
        if bad:
            clip, reason = bad[0]
            print(f"{grouped(len(bad))} clips have no features; the first is {clip.id} ({reason})", file=sys.stderr)
        print(f"{grouped(len(store))} clips, {gigabytes(store.num_bytes)}: {store.folder}")


def unusable(clips: Sequence[Clip], hashes: NDArray[np.bytes_], store: FeatureStore) -> Iterator[tuple[Clip, str]]:
    """Yields the clips that have no features in a filled store, with the reason."""
    for clip, content in zip(clips, hashes, strict=True):
        reason = "it cannot be opened" if content == UNREADABLE else store.skipped(bytes(content))
        if reason is not None:
            yield clip, reason


def info(overrides: Sequence[str]) -> None:
    """Prints a table of the feature stores.

    Args:
        overrides: Overrides as for train.py; `paths.cache_dir` determines the folder.
    """
    root = features_folder(compose(overrides))
    stores = list_stores(root)
    if not stores:
        print(f"There are no features in {root}.")
        return
    total = gigabytes(sum(store.num_bytes for store in stores))
    table = Table(title=f"{root}: {total}", title_justify="left", title_style="bold", box=None)
    for column in _COLUMNS:
        is_number = column in ("layer", "frames", "clips", "size")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for store in stores:
        table.add_row(*_row(store))
    table.caption = "Errors of the stored numbers are relative to the root mean square of the features."
    table.caption_justify = "left"
    wide_console().print(table)


def verify(overrides: Sequence[str]) -> None:
    """Compares all features with their checksums and removes damaged files.

    Args:
        overrides: Overrides as for train.py; `paths.cache_dir` determines the folder.

    Raises:
        SystemExit: With code 1 if a file is damaged.
    """
    root = features_folder(compose(overrides))
    stores = list_stores(root)
    if not stores:
        print(f"There are no features in {root}.")
        return
    with progress_reporter("verifying shards") as report:
        damages = verify_stores(root, report)
    for damage in damages:
        contents = f" (first {damage.contents[0]})" if damage.contents else ""
        kept = "" if damage.is_removed else "; it could not be removed because the folder is not writable"
        print(f"{damage.path}: {damage.reason}{contents}{kept}", file=sys.stderr)
    if not damages:
        print(f"All {grouped(sum(store.num_clips for store in stores))} clips in {root} match their checksums.")
        return
    are_removed = all(damage.is_removed for damage in damages)
    end = "they were removed, and the next run encodes them again" if are_removed else "not all could be removed"
    num_clips = sum(len(damage.contents) for damage in damages)
    print(f"Damaged: {grouped(num_clips)} clips in {grouped(len(damages))} files of {root}; {end}.")
    # Damage is the finding that a script asks about.
    raise SystemExit(1)


def prune(overrides: Sequence[str], *, max_gib: float | None = None, key: str | None = None) -> None:
    """Deletes the store `key`, or the least recently used stores until at most `max_gib` are left, or all stores.

    Args:
        overrides: Overrides as for train.py; `paths.cache_dir` determines the folder.
        max_gib: Size in GiB to keep; None keeps nothing.
        key: Key of the only store to delete.

    Raises:
        UserError: No store has this key.
    """
    root = features_folder(compose(overrides))
    # Without a limit or a key, everything goes: at most 0 bytes stay.
    freed = prune_stores(root, round((max_gib or 0.0) * 2**30)) if key is None else remove_store(root, key)
    left = list_stores(root)
    in_use = ", ".join(store.key for store in left if store.is_in_use)
    print(f"{gigabytes(freed)} freed, {gigabytes(sum(store.num_bytes for store in left))} left in {root}")
    if in_use and key is None:
        print(f"Kept because a running program uses them: {in_use}")


def _row(store: StoreInfo) -> list[str]:
    recipe: dict[str, Any] = store.recipe
    # Stores of an older version may lack some of these keys.
    frames = f"{recipe.get('num_frames', '?')} {recipe.get('sampling', '')}".strip()
    pooled = f", pooled by {recipe['pooled']['size']}" if recipe.get("pooled") else ""
    return [
        store.key,
        "/".join(Path(recipe.get("encoder_name") or "?").parts[-2:]),  # a hub id, or the end of a folder's path
        str(recipe.get("layer", "?")),
        frames,
        grouped(store.num_clips),
        gigabytes(store.num_bytes),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(store.last_used)),
        f"{recipe.get('dtype', '?')}{pooled}",
        *(("–", "–") if store.deviation is None else (f"{store.deviation.rms:.1e}", f"{store.deviation.max:.1e}")),
    ]
