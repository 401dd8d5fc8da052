"""Runs one check in its process: `python -m benchmarks.gpu.child NAME FUNCTION ROWS DEVICE SIZE FOLDER`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}

from benchmarks.gpu.registry import Place
from benchmarks.gpu.rows import Report, Skip
from vlmcap.errors import first_line
from vlmcap.libraries import set_cuda_variables


def main(name: str, function: str, rows: str, device: str, size: str, folder: str) -> None:
    """Runs the check; its rows go into a file, and its output to the screen."""
    set_cuda_variables()  # as the programs do, before PyTorch is imported
    report = Report(name, Path(rows), is_rehearsal=size == "tiny")
    module, _, called = function.partition(":")
    try:
        getattr(importlib.import_module(module), called)(report, Place(device, size == "tiny", Path(folder)))
    except Skip as reason:
        report.skip("all", str(reason))
    except Exception as error:
        traceback.print_exc()
        report.fail("all", f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
