"""Calls that may hang, crash or exhaust memory, made in a child process that can be lost without harm.

Data workers are daemonic, so `multiprocessing` gives them no children; this module forks by itself. Requests and facts
travel as JSON and tensors as raw bytes; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import math
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from vlmcap.errors import UserError

with contextlib.suppress(ImportError):  # Windows, where nothing is isolated
    import resource

Answer = tuple[dict[str, Any], Tensor | None]
"""Facts in the form of JSON, and a tensor or None."""

_OUT_OF_MEMORY = "out_of_memory"
_USER_ERROR = "user_error"
_FAILED = "failed"
_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1
_OOM_SCORE = "900"  # -1000 to 1000: a system out of memory kills this process rather than the one that trains
_GRACE_S = 2.0  # beyond the limit that the decoder checks itself
_EXIT_S = 1.0  # time to exit after the connection is lost; a process killed earlier could not report how it died
_REAP_S = 2.0  # a killed process blocked on a dead network drive ends when the drive answers, perhaps never


class LostError(Exception):
    """A call without an answer; the message is one sentence that gives the reason."""


def is_available() -> bool:
    """Returns whether calls can be isolated here; macOS can fork, but its libraries do not survive it."""
    return hasattr(os, "fork") and sys.platform != "darwin"


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an allocation failed, which torch reports as a RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


class Isolated:
    """Makes calls in a child of the calling process.

    The child is forked at the first call and again after each loss, and ends with this object. Copies in other
    processes (forked or pickled) have children of their own.

    Args:
        timeout_s: Time limit of one call; the child is killed two seconds later.
        memory_gib: Memory that the child may allocate on top of what it has when it is forked.
    """

    def __init__(self, timeout_s: float, memory_gib: float) -> None:
        self.timeout_s, self.memory_gib = timeout_s, memory_gib
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout_s": self.timeout_s, "memory_gib": self.memory_gib}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.timeout_s, self.memory_gib = state["timeout_s"], state["memory_gib"]
        self._reset()

    def call(self, function: Callable[[Any], Answer], request: Any) -> Answer:
        """Returns what `function` returns for `request`.

        Args:
            function: Function to call, the same in every call, because the child has it from its fork.
            request: Argument that JSON can represent.

        Raises:
            LostError: The child took too long, took too much memory or died.
            UserError: `function` raised it.
            RuntimeError: `function` raised any other error; the text is its traceback.
        """
        # After a fork, this object is a copy, and the child belongs to the other process.
        if self._owner != os.getpid():
            self._reset()
        with self._lock:
            child = self._living_child(function)
            try:
                return self._ask(child, request)
            except LostError as error:
                if child.num_calls == 1 or isinstance(error, _TooSlowError):
                    raise
            # An earlier clip may have left the first child damaged or full.
            return self._ask(self._living_child(function), request)

    def close(self) -> None:
        """Ends the child; another call would fork a new one."""
        if self._child is not None and self._owner == os.getpid():
            self._discard(self._child)

    def _reset(self) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._child: _Child | None = None
        self._unreaped: list[int] = []

    def _living_child(self, function: Callable[[Any], Answer]) -> _Child:
        # A child that ended between two calls is no clip's fault.
        if self._child is not None and _reap(self._child.pid, patience_s=0) is not None:
            self._child.close()
            self._child = None
        if self._child is None:
            self._unreaped = [pid for pid in self._unreaped if _reap(pid, patience_s=0) is None]
            self._child = _Child(function, int(self.memory_gib * 2**30))
        return self._child

    def _ask(self, child: _Child, request: Any) -> Answer:
        try:
            facts, tensor = child.ask(request, time.monotonic() + self.timeout_s + _GRACE_S)
        except TimeoutError:
            self._discard(child)
            raise _TooSlowError(
                f"decoding took longer than data.decode_timeout_s={self.timeout_s:g} and was stopped"
            ) from None
        except OSError:  # the child's end of the connection is closed
            raise LostError(_describe(self._discard(child, patience_s=_EXIT_S))) from None
        except BaseException:  # an interrupt: the pending answer must not be taken for that of the next call
            self._discard(child)
            raise
        if _OUT_OF_MEMORY in facts:
            self._discard(child)
            raise LostError(f"decoding needs more memory than data.decode_memory_gib={self.memory_gib:g}")
        if _USER_ERROR in facts:
            raise UserError(facts[_USER_ERROR])
        if _FAILED in facts:
            raise RuntimeError(f"in the decoding process:\n{facts[_FAILED]}")
        return facts, tensor

    def _discard(self, child: _Child, patience_s: float = 0.0) -> int | None:
        """Ends the child; returns its status as `os.waitpid` gives it, or None if it does not end."""
        self._child = None
        status = child.end(patience_s)
        if status is None:
            self._unreaped.append(child.pid)
        return status


class _TooSlowError(LostError):
    """A call that exceeded its time limit; another try would take as long again."""


class _Child:
    """A forked process that answers one request at a time."""

    def __init__(self, function: Callable[[Any], Answer], memory_bytes: int) -> None:
        self.num_calls = 0
        self._connection, theirs = socket.socketpair()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking a threaded process: the child uses no threads
            self.pid = os.fork()
        if self.pid == 0:
            _serve(theirs, function, memory_bytes, parent)
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self.pid, self._connection, parent)

    def ask(self, request: Any, deadline_s: float) -> Answer:
        """Sends a request and returns the answer.

        Raises:
            TimeoutError: No answer came by `deadline_s` of the monotonic clock.
            OSError: The connection is lost.
        """
        self.num_calls += 1
        line = json.dumps(request).encode()
        self._connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        # A message is its length, a header of JSON, and the bytes of the tensor, if any.
        self._connection.sendall(_LENGTH.pack(len(line)) + line)
        length = bytearray(_LENGTH.size)
        self._receive(memoryview(length), deadline_s)
        header = bytearray(_LENGTH.unpack(length)[0])
        self._receive(memoryview(header), deadline_s)
        facts, kind, shape = json.loads(header)
        if kind is None:
            return facts, None
        tensor = torch.empty(math.prod(shape), dtype=getattr(torch, kind))
        self._receive(tensor.view(torch.uint8).numpy().data, deadline_s)
        return facts, tensor.reshape(shape)

    def end(self, patience_s: float) -> int | None:
        """Kills the child after `patience_s`; returns its status, or None if it does not end."""
        self._finalizer.detach()
        return _end(self.pid, self._connection, os.getpid(), patience_s)

    def close(self) -> None:
        """Closes the connection to a child that has ended."""
        self._finalizer.detach()
        self._connection.close()

    def _receive(self, into: memoryview, deadline_s: float) -> None:
        while len(into):
            self._connection.settimeout(max(0.001, deadline_s - time.monotonic()))
            received = self._connection.recv_into(into)
            if received == 0:
                raise ConnectionResetError
            into = into[received:]


def _end(pid: int, connection: socket.socket, parent: int, patience_s: float = 0.0) -> int | None:
    # The child reads the end of its connection and exits.
    connection.close()
    if os.getpid() != parent:  # a copy of the object in a process forked later
        return None
    status = _reap(pid, patience_s)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = _reap(pid, patience_s=_REAP_S)
    return status


def _reap(pid: int, patience_s: float) -> int | None:
    """Waits for a child; returns its status, or None while it runs."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # another call has taken the status
            return 0
        if ended:
            return status
        if time.monotonic() >= deadline_s:
            return None
        time.sleep(0.001)


def _describe(status: int | None) -> str:
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGKILL:
            return "the decoder was killed (signal SIGKILL), most likely because the system ran out of memory"
        return f"the decoder crashed (signal {signal.Signals(number).name})"
    return "the decoder ended without an answer"


# The other side: what runs in a forked child until its parent ends or kills it.


def _serve(connection: socket.socket, function: Callable[[Any], Answer], memory_bytes: int, parent: int) -> NoReturn:
    """Answers requests with the results of `function`; never returns.

    Args:
        connection: Connection to the parent.
        function: Function from a request to facts and a tensor.
        memory_bytes: Memory that may be allocated beyond what is in use now.
        parent: Process id of the parent.
    """
    try:
        _prepare(connection, memory_bytes, parent)
        while (request := _receive(connection)) is not None:
            facts, tensor = _answer(function, json.loads(request))
            _send(connection, facts, tensor)
            if _OUT_OF_MEMORY in facts:
                break
            del tensor
    finally:
        # Without the parent's handlers at exit and buffers, which a fork has inherited.
        os._exit(0)


def _answer(function: Callable[[Any], Answer], request: Any) -> Answer:
    try:
        return function(request)
    except UserError as error:
        return {_USER_ERROR: str(error)}, None
    except Exception as error:
        return ({_OUT_OF_MEMORY: True} if is_out_of_memory(error) else {_FAILED: traceback.format_exc()}), None


def _prepare(connection: socket.socket, memory_bytes: int, parent: int) -> None:
    gc.freeze()  # garbage of the parent owns threads, workers and locks that do not exist here
    faulthandler.disable()
    _reset_signals()
    _die_with(parent)
    _redirect_open_files(keep=connection.fileno())
    _limit_memory(memory_bytes)
    torch.set_num_threads(1)  # the parent's threads do not exist here, and OpenMP would wait for them


def _reset_signals() -> None:
    """Lets faults kill the child silently, and ignores signals for the run's processes, which the parent handles."""
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # SIGKILL and SIGSTOP cannot be set
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _die_with(parent: int) -> None:
    """Dies with the parent. Outside Linux the end of the connection serves, which a child that hangs does not see."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before `prctl` was called.
    if os.getppid() != parent:
        os._exit(0)


def _redirect_open_files(keep: int) -> None:
    """Redirects every other descriptor to /dev/null, since pipes and locks held open here would outlive the parent.

    They are not closed: their numbers would be given to new files, which the owners of the old ones would close.
    """
    null = os.open(os.devnull, os.O_RDWR)
    with contextlib.suppress(OSError):  # without /proc they stay open
        for name in os.listdir("/proc/self/fd"):
            # 1 and 2 stay, so that messages of libraries are seen.
            if int(name) not in (1, 2, keep, null):
                with contextlib.suppress(OSError):
                    os.dup2(null, int(name))


def _limit_memory(memory_bytes: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # outside Linux memory is unlimited
        # The first number of statm is the size of the address space in pages.
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = taken + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def _receive(connection: socket.socket) -> bytes | None:
    """Returns the next request, or None at the end."""
    length = connection.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(length) < _LENGTH.size:
        return None
    return connection.recv(_LENGTH.unpack(length)[0], socket.MSG_WAITALL)


def _send(connection: socket.socket, facts: dict[str, Any], tensor: Tensor | None) -> None:
    kind = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
    header = json.dumps([facts, kind, None if tensor is None else list(tensor.shape)]).encode()
    connection.sendall(_LENGTH.pack(len(header)) + header)
    if tensor is not None:
        connection.sendall(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
