"""The checks of the acceptance run in their order, and their time budgets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TOTAL_S = 475.0  # of a whole run, under eight minutes; the budgets add up to more, as no GPU needs all of them


@dataclass(frozen=True, slots=True)
class Check:
    """A function that runs in a separate process.

    Attributes:
        name: Name on the command line and in the results.
        function: Function as `module:function`; it takes a `Report` and a `Place`.
        budget_s: Seconds after which it is stopped, including the start of the process.
        title: What it does, in one sentence.
        least_gib: GPU memory below which it is not started; the memory that its plan needs is checked when it runs.
    """

    name: str
    function: str
    budget_s: float
    title: str
    least_gib: float = 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a check runs.

    Attributes:
        device: "cuda" or "cpu".
        is_tiny: Whether sizes are those of a rehearsal.
        folder: Empty folder, which is removed afterwards.
    """

    device: str
    is_tiny: bool
    folder: Path

    @property
    def accelerator(self) -> str:
        """Value of `hardware.accelerator`."""
        return "gpu" if self.device == "cuda" else "cpu"


_HERE = "benchmarks.gpu."
CHECKS = (
    Check(
        "tests",
        _HERE + "pytest_checks:gpu_tests",
        50,
        "`pytest -m gpu`, but for tests/devices, which is the next check.",
    ),
    Check(
        "components",
        _HERE + "pytest_checks:components",
        75,
        "Loss, gradients and captions of every encoder, projector, reducer and number format, at tiny size, against "
        "the CPU.",
    ),
    Check(
        "recommended_l4",
        _HERE + "true_size:recommended_l4",
        95,
        "A training run and captions of the experiment at true size, random weights, captions of different lengths, "
        "beside the plan.",
        least_gib=12,
    ),
    Check(
        "run_bf16",
        _HERE + "real_run:bf16",
        45,
        "train.py twice with one seed, killed and resumed, evaluated, captioned, exported: bf16, 4 bits.",
    ),
    Check("run_fp16", _HERE + "real_run:fp16", 40, "The same in fp16 with loss scaling, unquantised."),
    Check(
        "t4",
        _HERE + "true_size:t4",
        45,
        "The path of a T4 forced: sdpa_repeated, fp16 with loss scaling, our decoding engine.",
    ),
    Check(
        "decode",
        _HERE + "decode:matrix",
        85,
        "Milliseconds of a caption token by slots, engine, deterministic mode, autocast's cache and adapters.",
        least_gib=9,
    ),
    Check(
        "recommended_h100",
        _HERE + "true_size:recommended_h100",
        95,
        "The largest recommended combination at true size, with captions per second of an evaluation batch.",
        least_gib=30,
    ),
    Check(
        "moe",
        _HERE + "true_size:moe",
        40,
        "Four layers of Qwen3-30B-A3B, 128 experts each, in 4 bits, beside their plan.",
    ),
    Check(
        "teardown_8bit",
        _HERE + "loading:teardown_8bit",
        30,
        "An 8-bit model stays on the GPU, and computes the same, when a fit ends.",
    ),
    Check(
        "load",
        _HERE + "loading:unquantised",
        20,
        "An unquantised language model is read from disk straight to the GPU.",
    ),
)
