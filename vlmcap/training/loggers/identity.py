"""Keeps the ids that loggers assign to a run in its folder, so that a resumed run continues its records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from vlmcap.config import Config
from vlmcap.files import write_json

FILE = "logger.json"


def known_ids(folder: Path) -> dict[str, str]:
    """Returns the ids of the run in a folder by kind of logger, such as `{"wandb": "x1y2z3"}`; it may be empty."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {kind: name for kind, name in content.items() if isinstance(name, str)} if isinstance(content, dict) else {}


def ids_to_resume(config: Config, folder: Path, step: int | None) -> dict[str, str]:
    """Returns the ids that a starting run continues: those in its folder if it resumes a checkpoint from there.

    Args:
        config: Run configuration.
        folder: Run folder.
        step: Step of the checkpoint that the run resumes from; None for a new run.
    """
    if step is None:
        return {}
    is_own = config.checkpoint in (None, "last") or folder_of(Path(config.checkpoint)) == folder.resolve()
    return known_ids(folder) if is_own else {}


def folder_of(checkpoint: Path) -> Path:
    """Returns the folder of the run that wrote a checkpoint."""
    return checkpoint.resolve().parent.parent


@rank_zero_only
def keep_ids(folder: Path, ids: Mapping[str, str]) -> None:
    """Writes the ids of a starting run, which replace those of an earlier one."""
    if not ids:
        (folder / FILE).unlink(missing_ok=True)
        return
    write_json(folder / FILE, dict(ids))
