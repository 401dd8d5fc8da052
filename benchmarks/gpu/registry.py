"""The checks of the acceptance run, in their order, and the seconds that each may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TOTAL_S = 475.0  # of a whole run: under eight minutes; the budgets of the checks add up to less


@dataclass(frozen=True, slots=True)
class Check:
    """A function that a process of its own calls.

    Attributes:
        name: On the command line and in the results.
        function: As `module:function`; it takes a `Report` and a `Place`.
        budget_s: Seconds after which it is stopped, start of the process included.
        title: What it does, one sentence.
    """

    name: str
    function: str
    budget_s: float
    title: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a check runs.

    Attributes:
        device: "cuda" or "cpu".
        is_tiny: Whether sizes are those of a rehearsal.
        folder: Empty, and removed afterwards.
    """

    device: str
    is_tiny: bool
    folder: Path

    @property
    def accelerator(self) -> str:
        """As `hardware.accelerator` takes it."""
        return "gpu" if self.device == "cuda" else "cpu"


_HERE = "benchmarks.gpu."
CHECKS = (
    Check("tests", _HERE + "pytest_checks:gpu_tests", 45, "`pytest -m gpu`, but for tests/devices, which is the next check."),
    Check(
        "parts",
        _HERE + "pytest_checks:parts",
        70,
        "Loss, gradients and captions of every encoder, projector, reducer and number format, at tiny size, against the CPU.",
    ),
    Check(
        "recommended_l4",
        _HERE + "true_size:recommended_l4",
        45,
        "A training run and captions of the experiment at true size, random weights, captions of different lengths, beside the plan.",
    ),
    Check(
        "recommended_h100",
        _HERE + "true_size:recommended_h100",
        50,
        "The same of the largest recommended combination, with captions per second of an evaluation batch.",
    ),
    Check("moe", _HERE + "true_size:moe", 30, "The same of four layers of Qwen3-30B-A3B, 128 experts each, in 4 bits."),
    Check("t4", _HERE + "true_size:t4", 30, "The path of a T4 forced: sdpa_repeated, fp16 with loss scaling, our decoding engine."),
    Check(
        "decode",
        _HERE + "decode:matrix",
        75,
        "Milliseconds of a caption token by rows, engine, deterministic mode, autocast's cache and adapters.",
    ),
    Check(
        "run_bf16",
        _HERE + "real_run:bf16",
        45,
        "train.py twice with one seed, killed and resumed, evaluated, captioned, exported: bf16, 4 bits.",
    ),
    Check("run_fp16", _HERE + "real_run:fp16", 35, "The same in fp16 with loss scaling, unquantised."),
    Check("load", _HERE + "loading:unquantised", 20, "An unquantised language model is read from disk straight to the GPU."),
    Check("teardown_8bit", _HERE + "loading:teardown_8bit", 25, "An 8-bit model stays on the GPU, and computes the same, when a fit ends."),
)
