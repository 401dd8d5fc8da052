"""`vlmcap doctor`: checks, measurements and what is kept of them, printed."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlmcap.compose import compose

_NO_DATA = "data.root=unset"  # the doctor needs no clips


def show_doctor(overrides: Sequence[str], *, as_json: bool = False) -> None:
    """Prints what was found, and exits with 1 where something keeps runs from working.

    Args:
        overrides: As `train.py` takes them: the hardware that is meant, and paths.
        as_json: As JSON.

    Raises:
        UserError: Something in the configuration does not do.
    """
    from vlmcap.build.doctor import run_checks
    from vlmcap.planning.doctor_table import show_checks, verdict

    checks = run_checks(compose([_NO_DATA, *overrides]))
    is_ready = not any(check.level == "problem" for check in checks)
    if as_json:
        plain = {"ready": is_ready, "verdict": verdict(checks), "checks": [check.plain() for check in checks]}
        print(json.dumps(plain, ensure_ascii=False, indent=2))
    else:
        show_checks(checks)
    if not is_ready:
        raise SystemExit(1)


def show_measurement(overrides: Sequence[str], num_blocks: int | None, *, as_json: bool = False) -> None:
    """Prints a plan beside what this machine did.

    Args:
        overrides: As `train.py` takes them; data.root is not needed.
        num_blocks: Of encoder and language model; None takes all.
        as_json: As JSON.
    """
    from vlmcap.build.measure import measure

    comparison = measure(overrides, num_blocks)
    if as_json:
        print(json.dumps(comparison.plain(), ensure_ascii=False, indent=2))
        return
    from vlmcap.planning.doctor_table import show_comparison

    show_comparison(comparison)


def forget(overrides: Sequence[str]) -> None:
    """Removes the measurements that are kept under paths.cache_dir."""
    from vlmcap.build.this_card import calibration_folder
    from vlmcap.planning.calibration import calibration_files

    folder = calibration_folder(compose([_NO_DATA, *overrides]))
    files = calibration_files(folder)
    for file in files:
        file.unlink(missing_ok=True)
        print(f"Removed {file.name}.")
    if not files:
        print(f"Nothing is kept in {folder}.")
