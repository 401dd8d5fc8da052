"""What training asks of POSIX, it goes without on Windows, whose modules and signals are taken away here."""

from __future__ import annotations

import importlib.util
import signal
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vlmcap.data.loading import worker_report
from vlmcap.training import summary
from vlmcap.training.callbacks import requeue


def test_runs_listen_to_the_signals_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGUSR1")
    spec = importlib.util.spec_from_file_location("requeue_of_windows", requeue.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.STOP_SIGNALS == (signal.SIGTERM, signal.SIGINT)


def test_data_workers_set_the_signals_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    set_signals: list[tuple[int, Any]] = []
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(signal, "SIGALRM")
    monkeypatch.setattr(signal, "signal", lambda number, action: set_signals.append((number, action)))
    worker_report.leave_signals_to_main()
    assert set_signals == [(signal.SIGINT, signal.SIG_IGN)]


@pytest.mark.parametrize("has_resource", [True, False])
def test_memory_is_measured_where_it_is_counted(has_resource: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_resource:
        monkeypatch.setitem(sys.modules, "resource", None)
    config = cast("Any", SimpleNamespace(hardware=SimpleNamespace(accelerator="cpu")))
    peak = summary._peak_memory_gib(config)
    assert peak is None if not has_resource else 0 < (peak or 0) < 1000
