"""What evaluations take while training: captions, their scores, and the rest."""

from __future__ import annotations

import time

_STEP = ".validation_step"
_SCORES = "[Callback]CaptionEvaluation.on_validation_epoch_end"


class EvaluationTimes:
    """Seconds of all evaluations of a run; each is told by its start, what Lightning does in it, and its end."""

    def __init__(self) -> None:
        self.count = 0
        self.is_captioning = False  # the batch to come is one of prompts
        self._seconds = {"captions": 0.0, "scores": 0.0, "rest": 0.0}
        self._begun: float | None = None
        self._mark = 0.0

    def start(self) -> None:
        """An evaluation begins."""
        self._begun = time.perf_counter()

    def end(self) -> None:
        """An evaluation ends; all of it that was neither captions nor scores is the rest."""
        if self._begun is not None:
            self._seconds["rest"] += time.perf_counter() - self._begun
            self._begun = None
            self.count += 1

    def action_starts(self, name: str) -> None:
        """Lightning begins something."""
        if self._begun is not None:
            self._mark = time.perf_counter() if self._kind(name) else self._mark

    def action_stops(self, name: str) -> None:
        """Lightning has done something."""
        if self._begun is not None and (kind := self._kind(name)):
            seconds = time.perf_counter() - self._mark
            self._seconds[kind] += seconds
            self._seconds["rest"] -= seconds

    def a_step(self, steps_between: int) -> dict[str, float]:
        """Seconds of a mean evaluation over the steps from one to the next; empty where there was none."""
        return {name: seconds / self.count / steps_between for name, seconds in self._seconds.items()} if self.count else {}

    def _kind(self, name: str) -> str | None:
        if name.endswith(_STEP) and name.startswith("[Strategy]"):
            return "captions" if self.is_captioning else None
        return "scores" if name == _SCORES else None
