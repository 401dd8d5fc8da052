"""Runs checks one after another, each in a separate process that is stopped when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.registry import Check, Place
from benchmarks.gpu.rows import Row, as_line, read_rows, verdict_of

ROOT = Path(__file__).resolve().parents[2]
_LEAST_S = 5.0  # no check starts with less time left
_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_MOST_LINES = 15  # of the log of a check that failed
_DESCRIBE = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
import torch
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
found = {"gpu": None}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found |= {"gpu": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1)}
    found |= {"compute capability": f"{properties.major}.{properties.minor}"}
found |= {"CUDA": torch.version.cuda, "Python": platform.python_version()}
found |= {name: of(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "lightning", "flash-attn")}
print(json.dumps(found))
"""


def describe_machine() -> dict[str, Any]:
    """Describes the GPU and the versions, from a process that then releases the GPU's memory.

    Raises:
        RuntimeError: PyTorch cannot be imported.
    """
    done = subprocess.run([sys.executable, "-c", _DESCRIBE], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise RuntimeError(f"{sys.executable} cannot import PyTorch ({last})")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_checks(
    checks: Sequence[Check],
    device: str,
    results: Path,
    *,
    is_tiny: bool,
    total_s: float,
    memory_gib: float | None,
    say: Callable[[str], None],
    after: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Runs the checks, and adds their rows to the results as each of them ends, even with an error.

    Args:
        checks: Checks in their order.
        device: "cuda" or "cpu".
        results: File of JSON lines.
        is_tiny: Whether sizes are those of a rehearsal.
        total_s: Seconds of all checks together.
        memory_gib: Memory of the GPU; None for a CPU.
        say: Receives a line as each check starts and ends.
        after: Called when the rows of a check are in the file.

    Returns:
        The last row of each check.
    """
    deadline, ends = time.monotonic() + total_s, []
    for number, check in enumerate(checks, 1):
        left_s = deadline - time.monotonic()
        budget_s = min(check.budget_s, left_s)
        place = f"[{number}/{len(checks)}] {check.name}"
        if reason := _too_small(check, memory_gib):
            end = _note(results, _end(check, 0.0, "skipped", reason))
        elif left_s < _LEAST_S:
            reason = f"not started, as the {total_s:.0f} s of the whole run were used up"
            end = _note(results, _end(check, 0.0, "stopped", reason))
        else:
            say(f"{place} … (up to {budget_s:.0f} s)")
            with tempfile.TemporaryDirectory(prefix="vlmcap-gpu-", ignore_cleanup_errors=True) as folder:
                end = _run(check, Place(device, is_tiny, Path(folder)), results, budget_s, say)
        ends.append(end)
        after()
        say(f"{place}: {end.verdict}, {end.value:.0f} s" + (f" ({end.note})" if end.note else ""))
    return ends


def _too_small(check: Check, memory_gib: float | None) -> str:
    """Returns why a check is not started on this GPU; empty if it is."""
    if memory_gib is None or memory_gib >= check.least_gib:
        return ""
    return f"skipped: needs {check.least_gib:.0f} GiB, and this GPU has {memory_gib:.0f}"


def _note(results: Path, *rows: Row) -> Row:
    """Adds rows to the results, and returns the last one."""
    with results.open("a", encoding="utf-8") as file:
        file.write("".join(as_line(row) for row in rows))
    return rows[-1]


def _run(check: Check, place: Place, results: Path, budget_s: float, say: Callable[[str], None]) -> Row:
    """Runs a check and returns its last row; its rows are added to the results even after Ctrl-C."""
    rows, log = place.folder / "rows.jsonl", place.folder / "log.txt"
    work = place.folder / "work"
    work.mkdir()
    size = "tiny" if place.is_tiny else "true"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.child",
        check.name,
        check.function,
        str(rows),
        place.device,
        size,
        str(work),
    ]
    started = time.monotonic()
    end = _end(check, 0.0, "stopped", "interrupted")
    try:
        with log.open("wb") as output:
            # In a new session, Ctrl-C reaches only this process, which then ends all that the check has started.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(budget_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_group(process)
        seconds, found = time.monotonic() - started, read_rows(rows)[1]
        if code is None:
            end = _end(check, seconds, "stopped", f"stopped after its budget of {budget_s:.0f} s")
        elif code:
            end = _end(check, seconds, "error", f"its process ended with {_name(code)}: {_last_line(log)}")
        else:
            end = _end(check, seconds, verdict_of(found), _problems(found))
        if end.verdict in ("error", "stopped"):
            say("\n".join(f"    {line}" for line in _log(log)[-_MOST_LINES:]))
    finally:
        _note(results, *read_rows(rows)[1], end)
    return end


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started in its session."""
    for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _end(check: Check, seconds: float, verdict: str, note: str) -> Row:
    return Row(check.name, "", "", round(seconds, 1), verdict, note=note)


def _problems(rows: Sequence[Row]) -> str:
    """Describes the first figure outside of its bounds, and counts the others."""
    bad = [row for row in rows if row.verdict in ("fail", "error")]
    if bad:
        first = bad[0]
        what = first.note if first.verdict == "error" else f"{first.measure} {first.value:.4g}, bound {first.limit}"
        return f"{first.case}: {what}" + (f"; and {len(bad) - 1} more" if len(bad) > 1 else "")
    skipped = [row for row in rows if row.verdict == "skipped"]
    return "" if not skipped else skipped[0].note if len(rows) == 1 else f"cases skipped: {len(skipped)}"


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"code {code}"


def _log(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []


def _last_line(path: Path) -> str:
    return next(reversed(_log(path)), "it printed nothing")
