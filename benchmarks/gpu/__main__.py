"""The acceptance run on a GPU: `make gpu`, or `python -m benchmarks.gpu` with any interpreter that has the packages.

    python -m benchmarks.gpu                         # all checks, under eight minutes
    python -m benchmarks.gpu --only decode t4        # some of them; the others' results stay
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --device cpu --tiny     # a rehearsal of the code, without a GPU

No weights and no network are needed: models have their true sizes and random weights. Results go to
benchmarks/gpu/results, a file of JSON lines and a page for each GPU. Exit codes: 0 all is within its bounds, 1
something is not, 2 there is no GPU, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.registry import CHECKS, TOTAL_S, Check
from benchmarks.gpu.rows import BAD, Row, as_line, read_rows
from benchmarks.gpu.runner import ROOT, describe_machine, run_checks
from benchmarks.gpu.table import page

_RESULTS = Path(__file__).parent / "results"
_PATIENCE = 4  # factor on the budgets, for a rehearsal on a busy CPU


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Runs the checks and returns the exit code."""
    options = _parse(arguments, checks)
    if options.list:
        print("\n".join(f"{check.name:18} {check.budget_s:4.0f} s  {check.title}" for check in checks))
        return 0
    try:
        machine = describe_machine()
    except RuntimeError as error:
        print(
            f"No acceptance run: {error}; choose an interpreter that has it, as in `make gpu PYTHON=python3`.",
            file=sys.stderr,
        )
        return 2
    if options.device == "cuda" and machine["gpu"] is None:
        print(
            "No acceptance run: PyTorch finds no GPU here; `--device cpu --tiny` rehearses the checks without one.",
            file=sys.stderr,
        )
        return 2
    chosen = [check for check in checks if not options.only or check.name in options.only]
    if options.tiny:
        options.total *= _PATIENCE
        chosen = [dataclasses.replace(check, budget_s=_PATIENCE * check.budget_s) for check in chosen]
    return _run(options, machine, chosen, {check.name: check.title for check in checks})


def _parse(arguments: Sequence[str] | None, checks: Sequence[Check]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Acceptance run on a GPU.")
    parser.add_argument(
        "--only", nargs="+", choices=[check.name for check in checks], help="checks to run; the others' results stay"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal, whose figures mean nothing")
    parser.add_argument("--total", type=float, default=TOTAL_S, help="seconds of all checks together")
    parser.add_argument("--output", type=Path, help="folder of the results; a rehearsal has a temporary one")
    parser.add_argument("--list", action="store_true", help="name the checks and their budgets")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny, as true sizes need a GPU")
    return options


def _run(options: argparse.Namespace, machine: dict[str, Any], chosen: Sequence[Check], titles: dict[str, str]) -> int:
    if options.output is None:
        options.output = Path(tempfile.mkdtemp(prefix="vlmcap-gpu-")) if options.tiny else _RESULTS
    name = machine["gpu"] if options.device == "cuda" else "a CPU (rehearsal)"
    results = options.output / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}.jsonl"
    shown = results.with_suffix(".md")
    options.output.mkdir(parents=True, exist_ok=True)
    _begin(results, machine | {"gpu": name, "date": datetime.date.today().isoformat(), "revision": _revision()}, chosen)

    def write_page() -> None:
        shown.write_text(page(*read_rows(results), titles), encoding="utf-8")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends as Ctrl-C does
    started = time.monotonic()
    try:
        ends = run_checks(
            chosen,
            options.device,
            results,
            is_tiny=options.tiny,
            total_s=options.total,
            memory_gib=machine.get("memory GiB") if options.device == "cuda" else None,
            say=_say,
            after=write_page,
        )
    except KeyboardInterrupt:
        write_page()
        _say(f"Interrupted after {time.monotonic() - started:.0f} s; {shown} has what was found until then.")
        return 130
    _say(_verdict(ends, name, time.monotonic() - started, shown))
    return int(any(end.verdict in BAD for end in ends))


def _begin(results: Path, machine: dict[str, Any], chosen: Sequence[Check]) -> None:
    """Writes the file again, with earlier results of the checks that do not run now."""
    names = {check.name for check in chosen}
    kept = [row for row in read_rows(results)[1] if row.check not in names]
    results.write_text(as_line(machine) + "".join(as_line(row) for row in kept), encoding="utf-8")


def _verdict(ends: Sequence[Row], name: str, seconds: float, shown: Path) -> str:
    """Returns the last line."""
    counts = {"pass": "passed", "rehearsed": "were rehearsed"}
    good = [end for end in ends if end.verdict in counts]
    words = counts[good[0].verdict] if good else "passed"
    clauses = [f"{len(good)} of {len(ends)} checks {words} on {name} in {seconds:.0f} s"]
    clauses += [
        f"{verdict}: {', '.join(end.check for end in ends if end.verdict == verdict)}"
        for verdict in ("fail", "error", "stopped", "skipped")
        if any(end.verdict == verdict for end in ends)
    ]
    return f"{'; '.join(clauses)}. The figures are in {shown}."


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
