"""Which process on which machine: names for files that processes leave for each other in a shared folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def machine_name() -> str:
    """8 hexadecimal digits for this boot of this machine; another one in a container with process numbers of its own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # without Linux the host name has to do
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def process_name() -> str:
    """`machine-pid` of this process."""
    return f"{machine_name()}-{os.getpid()}"


def is_here(name: str) -> bool:
    """Whether a `process_name` is of this machine."""
    return name.partition("-")[0] == machine_name()


def is_dead(name: str) -> bool:
    """Whether the process with this `process_name` has certainly ended; of other machines nothing is certain."""
    pid = name.partition("-")[2]
    if not is_here(name) or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False  # it runs under another user
    return False
