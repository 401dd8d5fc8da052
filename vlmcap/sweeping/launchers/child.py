"""A process of one job: `python -m vlmcap.sweeping.launchers.child FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from vlmcap.sweeping.launchers.packing import run_packed

if __name__ == "__main__":
    run_packed(Path(sys.argv[1]).read_bytes())
