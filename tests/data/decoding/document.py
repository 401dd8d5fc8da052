"""Tables of docs/reference/video.md that tests make: what they find has to stand there."""

from __future__ import annotations

import os
import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "reference" / "video.md"


def check_table(name: str, table: str) -> None:
    """Fails if the document has another table between `<!-- name -->` and `<!-- end -->`.

    With UPDATE_DOCS=1 it is written instead.
    """
    text = DOCUMENT.read_text("utf-8")
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- end -->)", text, re.DOTALL)
    assert found is not None, f"docs/reference/video.md has no table {name}"
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(text[: found.start()] + table + text[found.end() :], encoding="utf-8")
        return
    assert found[0] == table, "docs/reference/video.md is out of date: run this test with UPDATE_DOCS=1"
