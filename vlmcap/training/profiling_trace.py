"""A few steps as torch's profiler sees them, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vlmcap.files import replacing


class Trace:
    """Runs from its making to `write` or `drop`."""

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it says on stderr that it starts and stops
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities)
        self._profile.start()

    def write(self, path: Path) -> None:
        """Ends, and leaves a gzip file that is whole or not there."""
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder, replacing(path) as partial:
            raw = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(raw))
            with raw.open("rb") as source, gzip.open(partial, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)

    def drop(self) -> None:
        """Ends and leaves nothing."""
        self._profile.stop()
