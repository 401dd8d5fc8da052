"""Calls that may hang, crash or eat memory, made in a child process that can be lost without harm.

Data workers are daemonic, so `multiprocessing` gives them no children: this forks by itself. Requests and facts travel as JSON and
tensors as raw bytes; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from vlmcap.data.loading.isolated_child import FAILED, LENGTH, OUT_OF_MEMORY, USER_ERROR, Answer, serve
from vlmcap.errors import UserError

_GRACE_S = 2.0  # beyond the limit that the decoder looks at itself
_DEATH_S = 1.0  # that a process takes to end by itself after its connection has: killed on top, it would not tell how it died
_REAP_S = 2.0  # a killed process that stands in a dead network drive ends when the drive answers, which may be never


class LostError(Exception):
    """A call without an answer; the message is one sentence and says why."""


def is_available() -> bool:
    """Whether calls can be isolated here; macOS forks, but its libraries do not survive it."""
    return hasattr(os, "fork") and sys.platform != "darwin"


class Isolated:
    """Calls in a child of the process that makes them: forked at the first one, again after each loss, ended with this object.

    Copies in other processes (forked or pickled) get children of their own.

    Args:
        timeout_s: Of one call; two seconds later the child is killed.
        memory_gib: That the child may take beyond what it has when it is forked.
    """

    def __init__(self, timeout_s: float, memory_gib: float) -> None:
        self.timeout_s, self.memory_gib = timeout_s, memory_gib
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout_s": self.timeout_s, "memory_gib": self.memory_gib}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.timeout_s, self.memory_gib = state["timeout_s"], state["memory_gib"]
        self._forget()

    def call(self, function: Callable[[Any], Answer], request: Any) -> Answer:
        """What `function` gives for `request`, which JSON must be able to carry.

        Args:
            function: The same in every call: the child has it from its fork.
            request: Its argument.

        Raises:
            LostError: The child took too long, took too much memory or died.
            UserError: As `function` raised it.
            RuntimeError: `function` raised anything else; the text is its traceback.
        """
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            child = self._living_child(function)
            try:
                return self._ask(child, request)
            except LostError as error:
                if child.num_calls == 1 or isinstance(error, _TooSlowError):
                    raise
            return self._ask(self._living_child(function), request)  # an earlier clip may have left the first child damaged or full

    def close(self) -> None:
        """Ends the child; another call would fork a new one."""
        if self._child is not None and self._owner == os.getpid():
            self._drop(self._child)

    def _forget(self) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._child: _Child | None = None
        self._unreaped: list[int] = []

    def _living_child(self, function: Callable[[Any], Answer]) -> _Child:
        if self._child is not None and _reap(self._child.pid, patience_s=0) is not None:  # ended between two calls: no clip's fault
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
            self._drop(child)
            raise _TooSlowError(f"decoding took longer than data.decode_timeout_s={self.timeout_s:g} and was stopped") from None
        except OSError:  # the child's end of the connection is closed
            raise LostError(_describe(self._drop(child, patience_s=_DEATH_S))) from None
        except BaseException:  # an interrupt: the answer on its way must not be taken for the next one's
            self._drop(child)
            raise
        if OUT_OF_MEMORY in facts:
            self._drop(child)
            raise LostError(f"decoding needs more memory than data.decode_memory_gib={self.memory_gib:g}")
        if USER_ERROR in facts:
            raise UserError(facts[USER_ERROR])
        if FAILED in facts:
            raise RuntimeError(f"in the decoding process:\n{facts[FAILED]}")
        return facts, tensor

    def _drop(self, child: _Child, patience_s: float = 0.0) -> int | None:
        """End the child; its status as `os.waitpid` gives it, or None where it does not end."""
        self._child = None
        status = child.end(patience_s)
        if status is None:
            self._unreaped.append(child.pid)
        return status


class _TooSlowError(LostError):
    """Asking again would cost as long again."""


class _Child:
    """A forked process that answers one request at a time."""

    def __init__(self, function: Callable[[Any], Answer], memory_bytes: int) -> None:
        self.num_calls = 0
        self._connection, theirs = socket.socketpair()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child uses none
            self.pid = os.fork()
        if self.pid == 0:
            serve(theirs, function, memory_bytes, parent)
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self.pid, self._connection, parent)

    def ask(self, request: Any, deadline_s: float) -> Answer:
        """The answer.

        Raises:
            TimeoutError: There is none by `deadline_s` of the monotonic clock.
            OSError: The connection is lost.
        """
        self.num_calls += 1
        line = json.dumps(request).encode()
        self._connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        self._connection.sendall(LENGTH.pack(len(line)) + line)
        length = bytearray(LENGTH.size)
        self._receive(memoryview(length), deadline_s)
        header = bytearray(LENGTH.unpack(length)[0])
        self._receive(memoryview(header), deadline_s)
        facts, kind, shape = json.loads(header)
        if kind is None:
            return facts, None
        tensor = torch.empty(math.prod(shape), dtype=getattr(torch, kind))
        self._receive(tensor.view(torch.uint8).numpy().data, deadline_s)
        return facts, tensor.reshape(shape)

    def end(self, patience_s: float) -> int | None:
        """Kill it after `patience_s`; its status, or None where it does not end."""
        self._finalizer.detach()
        return _end(self.pid, self._connection, os.getpid(), patience_s)

    def close(self) -> None:
        """Let go of a child that has ended."""
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
    """The status of a child that has ended, or None while it runs."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # somebody else took the status
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
            return "the decoder was killed (signal SIGKILL), as systems do that run out of memory"
        return f"the decoder crashed (signal {signal.Signals(number).name})"
    return "the decoder ended without an answer"
