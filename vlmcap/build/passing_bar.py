"""A bar for long work in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def passing_bar(text: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr that goes when it is done, as a function that moves it by one; only on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    if not sys.stderr.isatty():
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task: Any = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
