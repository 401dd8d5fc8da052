"""A sweep to report on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reporting.report.run_folders import write_sweep


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun folder of eight runs that finished, one that was refused and one that failed; see `write_sweep`. Not to be changed."""
    return write_sweep(tmp_path_factory.mktemp("multirun") / "sweep")
