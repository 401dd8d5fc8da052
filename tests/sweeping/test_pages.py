"""Each job of a sweep leaves a page, by its first process, once its end is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sweeping.program import Program


def test_every_job_leaves_a_page_by_its_first_process(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[tuple[str, str]] = []

    def leave(folder: Path, *_: object, **__: object) -> None:
        pages.append((folder.name, json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"]))

    monkeypatch.setattr("vlmcap.reporting.report.run_page.leave_page", leave)
    assert program(["-m", "seed=0,1"]) == 0
    assert pages == [("0", "finished"), ("1", "finished")]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert program(["trainer=ddp", "hardware.devices=2", "paths.output_dir=run"]) == 0
    assert len(pages) == 2
