"""`status.json`: what became of a run, whatever it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vlmcap.files import replacing

FILE = "status.json"
FINISHED, FAILED, REFUSED, PRUNED, INTERRUPTED = "finished", "failed", "refused", "pruned", "interrupted"


@dataclass(frozen=True, slots=True)
class Status:
    """The end of a run.

    Attributes:
        status: `finished`; `refused` before anything was trained; `failed` at work; `pruned` as its trial was worse than others;
            `interrupted` by a signal, or not over yet.
        reason: One sentence; empty where the run finished.
        error: The exception's class.
        config_hash: Of `vlmcap.compose.config_hash`; None where the configuration itself was wrong.
        overrides: Of the command.
        objective: What `train.py` returns; a pruned run's last value.
        plan: `peak_gib` and `usable_gib` of a run that did not fit its card.
        seconds: From start to end.
    """

    status: str
    reason: str = ""
    error: str | None = None
    config_hash: str | None = None
    overrides: Sequence[str] = field(default=())
    objective: float | None = None
    plan: dict[str, float] | None = None
    seconds: float = 0.0

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end, with scores."""
        return self.status == FINISHED

    def write(self, folder: Path) -> None:
        """Writes `status.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = asdict(self) | {"overrides": list(self.overrides), "seconds": round(self.seconds, 2)}
        with replacing(folder / FILE) as partial:
            partial.write_text(json.dumps(plain, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_status(folder: Path) -> Status | None:
    """What became of the run in a folder; None where nothing says so."""
    try:
        plain: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Status(**{known.name: plain[known.name] for known in fields(Status) if known.name in plain})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
