"""The records of a report as JSON."""

from __future__ import annotations

import json

from vlmcap.reporting.report.records import Difference, GroupRow, Note, Report


def test_a_report_becomes_json() -> None:
    difference = Difference(-0.1, -0.2, 0.0, "clips", 0.04, 0.08)
    scores, intervals = {"val/cider": 1.0}, {"val/cider": (0.5, 1.5)}
    group = GroupRow("g1", "clip", {"encoder": "clip"}, ["r1"], [0], scores, intervals, "clips", difference,
                     False, True, {"seconds": None})  # fmt: skip
    report = Report("t", "now", "0.1", "val/cider", "CIDEr", True, "cider", "mecab_ko", 3, ["val/cider"], ["encoder"],
                    [], [group], [], [], [], [], [Note("one", "하나")])  # fmt: skip
    plain = json.loads(json.dumps(report.plain(), allow_nan=False))
    assert plain["groups"][0]["difference"]["p_value"] == 0.04
    assert plain["groups"][0]["intervals"] == {"val/cider": [0.5, 1.5]}
    assert plain["notes"] == [{"en": "one", "ko": "하나"}]
