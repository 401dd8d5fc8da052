"""What a full-size measurement on a GPU said of its plans, kept on disk for the plans to come."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vlmcap.config import Config
from vlmcap.files import replacing
from vlmcap.planning.hardware import DeviceInfo, detect_cpu, detect_gpu, matching_profile, planned_device


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measurement by `vlmcap doctor --measure`.

    Attributes:
        gpu: As PyTorch names it, or the processor.
        memory_gib: Of the GPU.
        hardware: The profile it was measured with.
        date: Day, as 2026-11-28.
        model: What was measured.
        beyond_ratio: Measured over planned bytes beyond weights and optimiser state, of training.
        context_gib: On the GPU beside what PyTorch allocates.
        utilisation: Share of the profile's peak arithmetic that training reached.
        bandwidth_share: Share of the profile's memory bandwidth that writing captions reached.
        launch_s: Seconds per kernel launch while captions were written.
        kernel_s: The same where steps were CUDA graphs.
        tokens_per_s: Caption tokens, over all clips of an evaluation batch.
    """

    gpu: str
    memory_gib: float
    hardware: str
    date: str
    model: str
    beyond_ratio: float
    context_gib: float
    utilisation: float
    bandwidth_share: float
    launch_s: float
    kernel_s: float
    tokens_per_s: float

    def __post_init__(self) -> None:
        for name in ("GPU", "hardware", "date", "model"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text")
        for name in (
            "memory_gib",
            "beyond_ratio",
            "utilisation",
            "bandwidth_share",
            "launch_s",
            "kernel_s",
            "tokens_per_s",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a number above 0")
        if not (math.isfinite(self.context_gib) and self.context_gib >= 0):
            raise ValueError("context_gib must not be negative")

    def on(self, gpu: DeviceInfo) -> DeviceInfo:
        """The GPU of a profile with the measured figures."""
        return replace(
            gpu,
            context_gib=self.context_gib,
            utilisation=self.utilisation,
            beyond_ratio=self.beyond_ratio,
            bandwidth_share=self.bandwidth_share,
            launch_s=self.launch_s,
            kernel_s=self.kernel_s,
            calibrated=f"{self.gpu}, {self.date}",
        )

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    """The file of a calibration, which appears whole or not at all; an earlier one of the GPU is replaced.

    Args:
        folder: Made where it is not there.
        calibration: What is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', calibration.gpu).strip('-.')}.json"
    with replacing(file) as partial:
        partial.write_text(json.dumps(calibration.plain(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return file


def calibration_files(folder: Path) -> list[Path]:
    """All that are kept, sorted."""
    return sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))


def read_calibrations(folder: Path) -> list[Calibration]:
    """All that can be read; a broken file is no reason to fail, as the plan's own figures stand in."""
    found = []
    names = {field.name for field in fields(Calibration)}
    for file in calibration_files(folder):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found.append(Calibration(**{name: value for name, value in values.items() if name in names}))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return found


def choose_calibration(
    found: Sequence[Calibration], hardware: str, here: str | None = None, here_profile: str | None = None
) -> Calibration | None:
    """The measurement that plans of a profile may use.

    Of the GPU that is here, or else of the very GPU that the profile is of.

    Args:
        found: All that are kept.
        hardware: The profile that is planned for.
        here: Name of this machine's GPU; None where there is none.
        here_profile: The profile that suits it. A plan for another profile is one for another machine.
    """
    known = [calibration for calibration in found if calibration.hardware == hardware]
    if here is not None and here_profile == hardware:
        return next((calibration for calibration in known if calibration.gpu == here), None)
    return next(
        (calibration for calibration in known if matching_profile(calibration.gpu, calibration.memory_gib) == hardware),
        None,
    )


def calibration_folder(config: Config) -> Path:
    """Where measurements of GPUs are kept."""
    return Path(config.paths.cache_dir).expanduser() / "calibration"


def calibrated_device(config: Config) -> DeviceInfo:
    """The GPU of the profile, or this computer, with what was measured on it.

    Without where nothing was, or on another GPU.
    """
    gpu = planned_device(config)
    if not (found := read_calibrations(calibration_folder(config))):
        return gpu  # without a look at the GPU, which would take memory on it
    here = detect_cpu() if config.hardware.accelerator == "cpu" else detect_gpu()
    name, profile = (None, None) if here is None else (here.name, here.profile)
    chosen = choose_calibration(found, config.hardware.name, name, profile)
    return gpu if chosen is None else chosen.on(gpu)
