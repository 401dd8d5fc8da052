"""The other side of `isolation`: what a forked child does until its parent ends or ends it."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from vlmcap.errors import UserError

with contextlib.suppress(ImportError):  # Windows, where nothing is isolated
    import resource

OUT_OF_MEMORY = "out_of_memory"
USER_ERROR = "user_error"
FAILED = "failed"

LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1
_FIRST_TO_GO = "900"  # of -1000 to 1000: a system out of memory takes this process, not the one that trains


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: torch says so in a RuntimeError only."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


Answer = tuple[dict[str, Any], Tensor | None]
"""Facts that JSON can carry, and a tensor or none."""


def serve(connection: socket.socket, function: Callable[[Any], Answer], memory_bytes: int, parent: int) -> NoReturn:
    """Answers requests with what `function` gives for them; never returns.

    Args:
        connection: To the parent.
        function: From a request to facts and a tensor.
        memory_bytes: That may be taken beyond what is taken now.
        parent: Its process id.
    """
    try:
        _prepare(connection, memory_bytes, parent)
        while (request := _receive(connection)) is not None:
            facts, tensor = _answer(function, json.loads(request))
            _send(connection, facts, tensor)
            if OUT_OF_MEMORY in facts:
                break
            del tensor
    finally:
        os._exit(0)


def _answer(function: Callable[[Any], Answer], request: Any) -> Answer:
    try:
        return function(request)
    except UserError as error:
        return {USER_ERROR: str(error)}, None
    except Exception as error:
        return ({OUT_OF_MEMORY: True} if is_out_of_memory(error) else {FAILED: traceback.format_exc()}), None


def _prepare(connection: socket.socket, memory_bytes: int, parent: int) -> None:
    gc.freeze()  # what the parent left for its collector has threads, workers and locks there, and none here
    faulthandler.disable()
    _reset_signals()
    _die_with(parent)
    _let_go_of_files(keep=connection.fileno())
    _limit_memory(memory_bytes)
    torch.set_num_threads(1)  # the parent's threads do not exist here, and OpenMP would wait for them


def _reset_signals() -> None:
    """Faults kill without a word; what is meant for the run's processes (an interrupt, a time limit's notice) is the parent's business."""
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # SIGKILL and SIGSTOP cannot be set
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _die_with(parent: int) -> None:
    """Elsewhere than on Linux, the end of the connection has to do; a child that hangs does not see it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _let_go_of_files(keep: int) -> None:
    """Every other descriptor leads to nowhere: held open here, pipes and locks of the parent would outlive it.

    They are not closed: their numbers would be given to new files, which the owners of the old ones would close.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    with contextlib.suppress(OSError):  # without /proc they stay open
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (1, 2, keep, nowhere):
                with contextlib.suppress(OSError):
                    os.dup2(nowhere, int(name))


def _limit_memory(memory_bytes: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # not Linux: unlimited
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = taken + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)


def _receive(connection: socket.socket) -> bytes | None:
    """The next request, or None at the end."""
    length = connection.recv(LENGTH.size, socket.MSG_WAITALL)
    if len(length) < LENGTH.size:
        return None
    return connection.recv(LENGTH.unpack(length)[0], socket.MSG_WAITALL)


def _send(connection: socket.socket, facts: dict[str, Any], tensor: Tensor | None) -> None:
    kind = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
    header = json.dumps([facts, kind, None if tensor is None else list(tensor.shape)]).encode()
    connection.sendall(LENGTH.pack(len(header)) + header)
    if tensor is not None:
        connection.sendall(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
