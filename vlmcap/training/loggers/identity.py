"""The ids that loggers gave to a run, kept in its folder so that a resumed run goes on with its records there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from vlmcap.config import Config
from vlmcap.files import replacing

FILE = "logger.json"


def known_ids(folder: Path) -> dict[str, str]:
    """The ids of the run in a folder by the logger's kind, such as `{"wandb": "x1y2z3"}`; empty where none is kept."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {kind: name for kind, name in content.items() if isinstance(name, str)} if isinstance(content, dict) else {}


def ids_to_resume(config: Config, folder: Path, step: int | None) -> dict[str, str]:
    """The ids that a starting run goes on with.

    Those in its folder, if it resumes a checkpoint of that folder, and else none.

    Args:
        config: Run configuration.
        folder: The run's folder.
        step: Step of the checkpoint that the run resumes from; None for a run from the start.
    """
    if step is None:
        return {}
    is_own = config.checkpoint in (None, "last") or folder_of(Path(config.checkpoint)) == folder.resolve()
    return known_ids(folder) if is_own else {}


def folder_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    return checkpoint.resolve().parent.parent


@rank_zero_only
def keep_ids(folder: Path, ids: Mapping[str, str]) -> None:
    """Writes the ids of a starting run in place of those of an earlier one."""
    if not ids:
        (folder / FILE).unlink(missing_ok=True)
        return
    with replacing(folder / FILE) as partial:
        partial.write_text(json.dumps(dict(ids)) + "\n", encoding="utf-8")
