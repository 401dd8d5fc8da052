"""The card of a plan, and the one that is in this machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from vlmcap.config import Config
from vlmcap.planning.calibration import choose_calibration, read_calibrations
from vlmcap.planning.cards import GIB, Card, card_of, suitable_profile


@dataclass(frozen=True, slots=True)
class Present:
    """A card, or the processor, of this machine.

    Attributes:
        name: As PyTorch names it.
        total_gib: Of its memory.
        free_gib: Of it, free now.
        profile: Name under `conf/hardware` that suits it; None if none does.
        capability: Compute capability; None of a processor.
    """

    name: str
    total_gib: float
    free_gib: float
    profile: str | None
    capability: tuple[int, int] | None = None


def present_card() -> Present | None:
    """The CUDA device that a run here would take; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Present(name, total / GIB, free / GIB, suitable_profile(name, total / GIB, capability), capability)


def present_processor() -> Present:
    """This machine's processor and memory."""
    total, free = _memory_gib()
    return Present(f"{_processor_name()}, {os.cpu_count() or 1} cores", total, free, "cpu")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "processor"


def _memory_gib() -> tuple[float, float]:
    """All, and what a program may take; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: float(rest.split()[0]) * 1024 / GIB for name, _, rest in (line.partition(":") for line in lines)}
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return 0.0, 0.0


def calibration_folder(config: Config) -> Path:
    """Where measurements of cards are kept."""
    return Path(config.paths.cache_dir).expanduser() / "calibration"


def assumed_card(config: Config) -> Card:
    """The card of the profile, or this computer, by data sheets alone."""
    cores = (os.cpu_count() or 1) if config.hardware.accelerator == "cpu" else None
    return card_of(config.hardware.name, config.hardware.memory_gib, cores)


def calibrated_card(config: Config) -> Card:
    """The card of the profile, or this computer, with what was measured on it; without where nothing was, or on another card."""
    card = assumed_card(config)
    if not (found := read_calibrations(calibration_folder(config))):
        return card  # without a look at the card, which would take memory on it
    here = present_processor() if config.hardware.accelerator == "cpu" else present_card()
    name, profile = (None, None) if here is None else (here.name, here.profile)
    chosen = choose_calibration(found, config.hardware.name, name, profile)
    return card if chosen is None else chosen.on(card)
