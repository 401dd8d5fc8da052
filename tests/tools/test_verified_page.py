"""The page of verified runs is that of docs/verified.json, and no row is written for a test that did not pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.verified_page import main, read_rows

ROW = '{"title": "4 bits", "command": "train", "found": ["loss 1"], "seconds": 3, "captions": []}'
SUITE = """<testsuites><testsuite timestamp="2026-11-30T21:00:00"><testcase name="four_bits"><properties>
<property name="verified:4 bits" value='{row}'/></properties>{outcome}</testcase></testsuite></testsuites>"""


def test_the_page_is_current() -> None:
    assert main(["--check"]) == 0


def test_rows_have_the_day_on_which_they_were_measured(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(SUITE.format(row=ROW, outcome=""), encoding="utf-8")
    found = read_rows(tmp_path / "junit.xml")
    assert (found["date"], [row["title"] for row in found["rows"]]) == ("2026-11-30", ["4 bits"])


@pytest.mark.parametrize("outcome", ["<failure/>", "<error/>", "<skipped/>"])
def test_a_test_that_did_not_pass_stops_the_page(tmp_path: Path, outcome: str) -> None:
    (tmp_path / "junit.xml").write_text(SUITE.format(row=ROW, outcome=outcome), encoding="utf-8")
    with pytest.raises(ValueError, match="did not pass: four_bits"):
        read_rows(tmp_path / "junit.xml")
