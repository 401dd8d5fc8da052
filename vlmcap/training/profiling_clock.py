"""Seconds by part: what is innermost at a moment has that moment, so that parts add up to the whole."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

OTHER = "other"


class Recorder(Protocol):
    """What is told where a step is: a clock, or a trace."""

    def enter(self, part: str) -> None:
        """A part begins inside the present one."""
        ...

    def leave(self) -> None:
        """The innermost part ends."""
        ...

    def turn(self, part: str) -> None:
        """The rest of the innermost part belongs to another one."""
        ...

    def pause(self) -> None:
        """A step ends, and no other begins at once."""
        ...

    def resume(self) -> None:
        """A step begins."""
        ...


class PartClock:
    """Seconds that each part took, without the parts inside it; what is in none is "other".

    Args:
        now: Seconds, from any start.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.wall = 0.0  # between resume and pause, by readings of its own
        self._now, self._stack, self._last, self._begun = now, [OTHER], 0.0, 0.0
        self._is_running = False

    def enter(self, part: str) -> None:
        """A part begins inside the present one."""
        if self._is_running:
            self._charge()
            self._stack.append(part)

    def leave(self) -> None:
        """The innermost part ends."""
        if self._is_running:
            self._charge()
            self._stack.pop()

    def turn(self, part: str) -> None:
        """The rest of the innermost part belongs to another one."""
        if self._is_running:
            self._charge()
            self._stack[-1] = part

    def resume(self) -> None:
        """Runs, from now on in no part; does nothing while it runs."""
        if not self._is_running:
            self._is_running, self._stack = True, [OTHER]
            self._begun = self._last = self._now()

    def pause(self) -> None:
        """Stands still; does nothing while it does."""
        if self._is_running:
            self._charge()
            self.wall += self._now() - self._begun
            self._is_running = False

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now


class PartSpans:
    """The same parts as named spans of torch's profiler."""

    def __init__(self) -> None:
        self._spans: list[Any] = []
        self._is_running = False

    def enter(self, part: str) -> None:
        """A part begins inside the present one."""
        if self._is_running:
            from torch.profiler import record_function

            span = record_function(f"vlmcap: {part}")
            span.__enter__()
            self._spans.append(span)

    def leave(self) -> None:
        """The innermost part ends."""
        if self._is_running:
            self._spans.pop().__exit__(None, None, None)

    def turn(self, part: str) -> None:
        """The rest of the innermost part belongs to another one."""
        self.leave()
        self.enter(part)

    def resume(self) -> None:
        """A step begins."""
        if not self._is_running:
            self._is_running = True
            self.enter("step")

    def pause(self) -> None:
        """A step ends, with all spans that are open."""
        while self._spans:
            self.leave()
        self._is_running = False


class PlainSteps:
    """Seconds of steps that nobody looks into."""

    def __init__(self) -> None:
        self._seconds, self._count = 0.0, 0
        self._mark: float | None = None

    def begin(self) -> None:
        """A step begins, and the one before ends unless there was a pause."""
        now = time.perf_counter()
        if self._mark is not None:
            self._seconds, self._count = self._seconds + now - self._mark, self._count + 1
        self._mark = now

    def pause(self) -> None:
        """What comes now is no step, and what went on is not counted."""
        self._mark = None

    @property
    def mean_s(self) -> float | None:
        """Of a step, or None if there was none."""
        return self._seconds / self._count if self._count else None
