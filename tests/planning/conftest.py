"""Fixtures of the tests of plans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder per module, so that its memory profiles are made again, but only once."""
    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMCAP_CACHE_DIR", str(folder))
        yield folder
