"""Checks that end in every way a check can end; processes of their own call them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.gpu.registry import Check, Place
from benchmarks.gpu.rows import Limit, Report, Skip

BOUND = Limit(0.9, 1.05, "a goal")


def good(report: Report, place: Place) -> None:
    report.add("training", "a ratio", 1.0, BOUND)
    report.add("captions", "ms per token", 12.5)


def bad(report: Report, place: Place) -> None:
    report.add("training", "a ratio", 1.3, BOUND)


def small(report: Report, place: Place) -> None:
    raise Skip("needs 80 GiB, and this GPU has 22")


def broken(report: Report, place: Place) -> None:
    report.add("training", "a ratio", 1.0, BOUND)
    raise ValueError("no kernel\nfor this")


def dead(report: Report, place: Place) -> None:
    print("the driver went away", flush=True)
    os._exit(3)


def endless(report: Report, place: Place) -> None:
    """With a process of its own, whose number it writes down."""
    report.add("training", "a ratio", 1.0, BOUND)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.add("training", "process", child.pid)
    time.sleep(600)


def invented(name: str, budget_s: float = 60.0) -> Check:
    """A check of this file."""
    return Check(name, f"{__name__}:{name}", budget_s, f"What {name} does.")
