"""A sweep to report on, and a page in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.reporting.report.browser import Browser, find_chromium
from tests.reporting.report.invented import make_report
from tests.reporting.report.run_folders import write_one_run, write_sweep


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multirun folder of eight runs that finished, one that was refused and one that failed; see `write_sweep`.

    Not to be changed.
    """
    return write_sweep(tmp_path_factory.mktemp("multirun") / "sweep")


@pytest.fixture(scope="session")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended, as `write_one_run` makes it. Not to be changed."""
    folder = tmp_path_factory.mktemp("one")
    return write_one_run(folder / "run", folder / "videos")


@pytest.fixture(scope="session")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    from vlmcap.data.decoding.video import write_video
    from vlmcap.reporting.report.page import read_all_frames, report_page

    frames = np.random.default_rng(0).integers(0, 255, (8, 90, 160, 3)).astype(np.uint8)
    write_video(folder / "a.mp4", frames, fps=4)
    report = make_report(videos=[str(folder / "a.mp4")] * 3)
    (folder / "index.html").write_text(report_page(report, read_all_frames(report.clips)), encoding="utf-8")
    return folder / "index.html"


@pytest.fixture(scope="session")
def run_page_file(one_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlmcap.compose import read_yaml
    from vlmcap.reporting.report.run_page import run_page

    file = tmp_path_factory.mktemp("run_page") / "index.html"
    file.write_text(run_page(one_run, read_yaml, version="0.1.0"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def started_browser() -> Iterator[Browser]:
    """A browser for the tests of a file: one that stays open takes a processor from the tests that follow."""
    program = find_chromium()
    assert program is not None
    try:
        browser = Browser(program)
    except (RuntimeError, OSError) as error:  # such as a stub that only says where to get the real one
        pytest.skip(f"{program} does not start: {error}")
    with browser:
        yield browser


@pytest.fixture
def browser(started_browser: Browser, page_file: Path) -> Iterator[Browser]:
    """The page, freshly loaded; whatever a test does to it may raise no error and ask for no address."""
    yield from shown(started_browser, page_file)


@pytest.fixture
def run_browser(started_browser: Browser, run_page_file: Path) -> Iterator[Browser]:
    """The page of one run, as `browser` shows that of many."""
    yield from shown(started_browser, run_page_file)


def shown(browser: Browser, page: Path) -> Iterator[Browser]:
    """A page in a browser, for a test; it raises no error and asks for no address."""
    browser.show_as(width=1280)
    browser.open(page)
    yield browser
    browser.run("localStorage.clear()")
    assert browser.errors() == []
    assert browser.requests() == [page.resolve().as_uri()]
