"""Runs the tests that need a GPU with pytest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu import limits
from benchmarks.gpu.registry import Place
from benchmarks.gpu.rows import Limit, Report

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = "tests/devices/test_on_gpu.py"
_TINY_COMPONENTS = "siglip or bf16"
_FIGURES: dict[str, tuple[str, dict[bool, Limit]]] = {
    "loss": ("loss, relative difference", {False: limits.LOSS, True: limits.HALF_LOSS}),
    "gradients": ("gradients, relative difference", {False: limits.GRADIENTS, True: limits.HALF_GRADIENTS}),
    "captions": ("share of captions that are those of the CPU", {False: limits.ALL}),
}


def gpu_tests(report: Report, place: Place) -> None:
    """Runs every test with the marker `gpu`, except those of `COMPONENTS`; a rehearsal only collects them."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if _is_marked(path))
    files = [file for file in files if file != COMPONENTS]
    if place.is_tiny:
        output = _pytest(place, [*files, "--collect-only", "-q"])
        report.add("tests", "collected", len(re.findall(r"^tests/\S+::", output, re.MULTILINE)))
        return
    _pytest(place, [*files, "-q"])
    for name, _, problem, reason in _cases(place):
        if reason:
            report.skip(name, reason)
        elif problem:
            report.fail(name, problem)
        else:
            report.add(name, "passes", 1, limits.ALL)


def components(report: Report, place: Place) -> None:
    """Checks loss, gradients and captions of all components against their bounds."""
    _pytest(place, [COMPONENTS, "-q", *(["-k", _TINY_COMPONENTS] if place.is_tiny else [])])
    for name, figures, problem, reason in _cases(place):
        case = name.partition("[")[2].rstrip("]")
        for key, (measure, bounds) in _FIGURES.items():
            if key in figures:
                report.add(case, measure, float(figures[key]), bounds.get("is_half" in figures))
        if reason:
            report.skip(case, reason)
        elif problem and not figures:
            report.fail(case, problem)


def _is_marked(path: Path) -> bool:
    return "@pytest.mark.gpu" in path.read_text(encoding="utf-8")


def _pytest(place: Place, arguments: Sequence[str]) -> str:
    """Runs pytest and returns its output; the results go into a file.

    Raises:
        RuntimeError: No test ran to its end.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={place.folder / 'tests.xml'}",
    ]
    environment = os.environ | {"VLMCAP_TEST_DEVICE": place.device}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr, sep="\n", flush=True)
    if done.returncode not in (0, 1):  # 1: some tests failed
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "it printed nothing")
        raise RuntimeError(f"pytest ended with {done.returncode}: {last}")
    return done.stdout


def _cases(place: Place) -> Iterator[tuple[str, dict[str, str], str, str]]:
    """Yields name, recorded properties, problem and skip reason of each test."""
    for case in ElementTree.parse(place.folder / "tests.xml").iter("testcase"):
        figures = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skipped = case.find("skipped")
        name = f"{case.get('classname', '').removeprefix('tests.')}: {case.get('name')}"
        problem = "" if bad is None else (bad.get("message") or "failed").splitlines()[0]
        yield name, figures, problem, "" if skipped is None else skipped.get("message") or "skipped"
