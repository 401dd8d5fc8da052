"""A process of one job, which comes by its standard input: `python -m vlmcap.sweeping.launchers.child`."""

from __future__ import annotations

import sys

from vlmcap.sweeping.launchers.packing import run_packed

if __name__ == "__main__":
    run_packed(sys.stdin.buffer.read())
