"""What the documentation repeats of the code is current: commands, choices, and the table of GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import site_pages as program
from vlmcap.cli.arguments import COMMANDS, PROGRAMS

ROOT = Path(__file__).resolve().parents[2]


def test_the_commands_are_current() -> None:
    text = (program.REFERENCE / "commands.md").read_text(encoding="utf-8")
    assert text == program.commands_page(), "run make pages"
    for name in (*PROGRAMS, *(command.name for command in COMMANDS), "cache build", "data check"):
        assert f"## `vlmcap {name}`" in text


def test_the_choices_are_current() -> None:
    text = (program.REFERENCE / "choices.md").read_text(encoding="utf-8")
    assert text == program.choices_page(), "run make pages"
    files = [path for path in (ROOT / "conf").glob("*/*.yaml") if path.stem not in program.UNCHOSEN]
    assert len(re.findall(r"^\| \**`", text, re.MULTILINE)) == len(files)


@pytest.mark.slow
def test_the_tables_of_gpus_are_current() -> None:
    for name, language in program.GPU_DOCUMENTS.items():
        found = program.GPU_TABLE.search((ROOT / name).read_text(encoding="utf-8"))
        assert found is not None, f"{name} has no table of GPUs"
        assert found[0] == program.gpu_table(language), "run make pages"


def test_check_tells_stale_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(program, "pages", lambda: {page: "new"})
    assert program.main(["--check"]) == 1
    assert capsys.readouterr().err == "page.md: not current; run python -m tools.site_pages\n"
    assert program.main([]) == 0
    assert (page.read_text(encoding="utf-8"), program.main(["--check"])) == ("new", 0)
