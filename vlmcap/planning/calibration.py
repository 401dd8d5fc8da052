"""Full-size measurements on a device, which are stored to make later plans more accurate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vlmcap.config import Config
from vlmcap.files import write_json
from vlmcap.planning.hardware import DeviceInfo, detect_cpu, detect_gpu, matching_profile, planned_device


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measurement by `vlmcap doctor --measure`.

    Attributes:
        device_name: GPU name that PyTorch reports, or the CPU's model name.
        memory_gib: Memory of the device.
        hardware: Hardware profile that was measured.
        date: Day, such as 2026-11-28.
        model: Names of the measured components.
        activation_ratio: Measured over planned bytes of training, without weights and optimiser state.
        context_gib: GPU memory beside what PyTorch allocates.
        utilisation: Share of the profile's peak arithmetic that training reached.
        bandwidth_share: Share of the profile's memory bandwidth that caption decoding reached.
        launch_s: Seconds per kernel launch during caption decoding.
        kernel_s: Seconds per kernel where decoding steps were CUDA graphs.
        tokens_per_s: Caption tokens per second, over all clips of an evaluation batch.
    """

    device_name: str
    memory_gib: float
    hardware: str
    date: str
    model: str
    activation_ratio: float
    context_gib: float
    utilisation: float
    bandwidth_share: float
    launch_s: float
    kernel_s: float
    tokens_per_s: float

    def __post_init__(self) -> None:
        for name in ("device_name", "hardware", "date", "model"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text")
        for name in (
            "memory_gib",
            "activation_ratio",
            "utilisation",
            "bandwidth_share",
            "launch_s",
            "kernel_s",
            "tokens_per_s",
        ):
            # A broken or edited file must not lead to plans of zero or infinite seconds.
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a number above 0")
        if not (math.isfinite(self.context_gib) and self.context_gib >= 0):
            raise ValueError("context_gib must not be negative")

    def on(self, device: DeviceInfo) -> DeviceInfo:
        """Returns the device of a hardware profile with the measured figures."""
        return replace(
            device,
            context_gib=self.context_gib,
            utilisation=self.utilisation,
            activation_ratio=self.activation_ratio,
            bandwidth_share=self.bandwidth_share,
            launch_s=self.launch_s,
            kernel_s=self.kernel_s,
            calibrated=f"{self.device_name}, {self.date}",
        )

    def plain(self) -> dict[str, Any]:
        """Returns JSON-serialisable data."""
        return asdict(self)


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    """Writes a calibration to its file atomically, in place of an earlier one of the same device.

    Args:
        folder: Folder of all calibrations; created if missing.
        calibration: Calibration to store.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # "NVIDIA L4" -> "NVIDIA-L4.json"
    file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', calibration.device_name).strip('-.')}.json"
    write_json(file, calibration.plain())
    return file


def calibration_files(folder: Path) -> list[Path]:
    """Returns the stored files, sorted."""
    return sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))


def read_calibrations(folder: Path) -> list[Calibration]:
    """Reads all calibrations, skipping broken files, as a plan can do without them."""
    calibrations = []
    names = {field.name for field in fields(Calibration)}
    for file in calibration_files(folder):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            # Keys of another version are left out, and a missing one raises a TypeError.
            calibrations.append(Calibration(**{name: value for name, value in values.items() if name in names}))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return calibrations


def choose_calibration(
    calibrations: Sequence[Calibration], hardware: str, here: str | None = None, here_profile: str | None = None
) -> Calibration | None:
    """Chooses the measurement that plans of a hardware profile may use.

    It is that of this machine's device, or else of exactly the GPU model that the profile describes.

    Args:
        calibrations: Stored calibrations.
        hardware: Hardware profile that is planned for.
        here: Name of this machine's device; None where there is none.
        here_profile: Hardware profile that suits it. A plan for another profile is a plan for another machine.
    """
    known = [calibration for calibration in calibrations if calibration.hardware == hardware]
    # On a machine of this profile, only its own GPU counts.
    if here is not None and here_profile == hardware:
        return next((calibration for calibration in known if calibration.device_name == here), None)
    # A plan for another machine takes a measurement of exactly that GPU, not of one that is merely similar.
    return next(
        (
            calibration
            for calibration in known
            if matching_profile(calibration.device_name, calibration.memory_gib) == hardware
        ),
        None,
    )


def calibration_folder(config: Config) -> Path:
    """Returns the folder of calibrations."""
    return Path(config.paths.cache_dir).expanduser() / "calibration"


def calibrated_device(config: Config) -> DeviceInfo:
    """Returns the device of the hardware profile, or this machine's CPU, with measured figures where there are any."""
    device = planned_device(config)
    if not (calibrations := read_calibrations(calibration_folder(config))):
        return device  # before the GPU is queried, which would take memory on it
    here = detect_cpu() if config.hardware.accelerator == "cpu" else detect_gpu()
    name, profile = (None, None) if here is None else (here.name, here.profile)
    chosen = choose_calibration(calibrations, config.hardware.name, name, profile)
    return device if chosen is None else chosen.on(device)
