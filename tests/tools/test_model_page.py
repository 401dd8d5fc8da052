"""docs/reference/models.md is what configuration and measured errors give; every parity test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import model_page as program
from tools import model_tables as table

ROOT = Path(__file__).resolve().parents[2]
JUNIT = """<testsuites><testsuite>
  <testcase classname="tests.a" name="test_x[tower]" file="tests/a.py"><properties>
    <property name="parity:encoder:clip" value="2e-06"/><property name="other" value="text"/></properties></testcase>
  <testcase classname="tests.a" name="test_x[whole]" file="tests/a.py"><properties>
    <property name="parity:encoder:clip" value="1.5e-07"/></properties></testcase>
  <testcase classname="tests.b" name="test_y" file="tests/b.py"/>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def page() -> str:
    return program.page()


def rows(page: str, title: str) -> dict[str, list[str]]:
    """Cells of each row of one section, by name."""
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in lines}


@pytest.mark.slow
def test_the_page_is_current(page: str) -> None:
    assert program.PAGE.read_text(encoding="utf-8") == page, "run python -m tools.model_page"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "group"), [("Encoders", "encoder"), ("Projectors", "projector"), ("Language models", "llm")]
)
def test_every_name_of_a_group_has_a_row(page: str, title: str, group: str) -> None:
    names = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml") if not file.stem.startswith("tiny")} - {
        "native",
        "custom",
    }
    assert rows(page, title).keys() == names


@pytest.mark.slow
def test_a_row_has_the_true_sizes(page: str) -> None:
    encoder = rows(page, "Encoders")["clip"]
    assert encoder[2:6] == ["`CLIPVisionModel`", "303.5 M", "1024", "576"]
    assert rows(page, "Encoders")["siglip2_naflex"][5] == "at most 256"
    assert "gated" in rows(page, "Encoders")["dinov3_l"][6]
    assert rows(page, "Projectors")["mlp"][2] == "4 608"
    assert rows(page, "Language models")["qwen3_30b_a3b"][2:7] == [
        "`Qwen3MoeForCausalLM`",
        "30 532 M",
        "2048",
        "48",
        "262 144",
    ]
    assert "non-commercial" in rows(page, "Language models")["exaone4_32b"][7]
    assert rows(page, "Hardware")["l4"][5] == "1 × 16"


def test_every_parity_test_that_is_named_exists() -> None:
    measured = table.read_parity(program.PARITY)
    assert {"llm:llama", "llm:qwen3", "llm:qwen3_moe"} <= measured.keys()
    for key, parity in measured.items():
        path, _, name = parity.test.partition("::")
        assert re.search(rf"^\s*def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{key}: {parity.test}"
        )
        assert 0 <= parity.error < 1e-2, f"{key} differs by {parity.error}"


def test_errors_are_read_from_what_the_tests_recorded(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert program.read_measured(tmp_path / "junit.xml") == {
        "encoder:clip": {"test": "tests/a.py::test_x", "error": 2e-6}
    }


@pytest.mark.slow
def test_check_tells_a_stale_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "page", lambda: page)
    monkeypatch.setattr(program, "PAGE", tmp_path / "models.md")
    assert program.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/reference/models.md is outdated; run python -m tools.model_page\n"
    assert program.main([]) == 0
    assert program.main(["--check"]) == 0
    assert capsys.readouterr().err == ""


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert table.markdown_table(["a", "b"], [["x|y", "z"]]) == "| a | b |\n| --- | --- |\n| x\\|y | z |\n"
