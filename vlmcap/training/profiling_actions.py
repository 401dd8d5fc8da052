"""What Lightning says that it does, and which part of a step that is."""

from __future__ import annotations

from typing import Protocol

from lightning.pytorch.profilers import Profiler

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
# Lightning's names of what it does, without the class in their middle, and our part.
_PARTS = {
    ("[Strategy]", "batch_to_device"): "transfer",
    ("[Strategy]", "training_step"): "other",
    ("[Strategy]", "backward"): "backward",
    ("[LightningModule]", "optimizer_zero_grad"): "optimiser",
    ("[LightningModule]", "optimizer_step"): "optimiser",  # forward and backward run inside, and are taken out
}


class Owner(Protocol):
    """Who is told."""

    def action_starts(self, name: str, part: str | None) -> None:
        """Lightning begins something that is this part, or of no part."""
        ...

    def action_stops(self, name: str, part: str | None) -> None:
        """Lightning has done it."""
        ...


class Actions(Profiler):
    """Passes on what Lightning says that it does.

    Args:
        owner: To whom.
    """

    def __init__(self, owner: Owner) -> None:
        super().__init__()
        self._owner = owner
        self._parts: dict[str, str | None] = {FETCH: "wait"}

    def start(self, action_name: str) -> None:
        """Passes on."""
        self._owner.action_starts(action_name, self._part(action_name))

    def stop(self, action_name: str) -> None:
        """Passes on."""
        self._owner.action_stops(action_name, self._part(action_name))

    def _part(self, action: str) -> str | None:
        if action not in self._parts:
            kind, _, rest = action.partition("]")
            self._parts[action] = _PARTS.get((f"{kind}]", rest.rpartition(".")[2]))
        return self._parts[action]
