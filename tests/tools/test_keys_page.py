"""docs/reference/keys.md is what the dataclasses say, with every key that a configuration has."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from tools import keys_page as program
from vlmcap.compose import compose
from vlmcap.config import Config, Reducer
from vlmcap.config.checks import follows, only_with
from vlmcap.config.kinds import SCHEMAS
from vlmcap.config_errors import _paths


@dataclass
class Inner:
    """What is inside."""

    rank: int = 16


def other() -> Inner:
    return Inner(rank=8)


@dataclass
class Base:
    """The first sentence,
    over two lines.

    More of it.
    """

    name: str = "???"
    share: float = 0.5  # of what is there
    # Above it,
    # in two lines.
    limit: int | None = None


@dataclass
class Example(Base):
    """A kind."""

    share: float = 0.25
    inner: Inner = field(default_factory=other)  # is not shown: its keys are
    reducer: Reducer = Reducer.none
    size: int = only_with("reducer=pool", lambda c: c.reducer is Reducer.pool, 2)  # 변의 길이
    rate: float = follows("llm.rate", 1.0)
    folder: str = follows("${paths.cache_dir}/demo", "")
    text: str = ""
    is_on: bool = True


def test_the_page_is_current() -> None:
    assert program.PAGE.read_text(encoding="utf-8") == program.page(), "run python -m tools.keys_page"


def test_every_key_has_a_row() -> None:
    rows = {line.split("`")[1] for line in program.page().splitlines() if line.startswith("| `")}
    groups = {known.name for known in fields(Config)} - {"seed", "monitor", "mode", "checkpoint"}
    owners = {path.rpartition(".")[0] for path in _paths(Config)}
    wanted = {path for path in _paths(Config) if path not in groups | owners} - {f"{group}.kind" for group in SCHEMAS}
    assert rows == wanted


def test_a_row_has_type_default_and_comment() -> None:
    rows = {key.path: key.row[1:] for key in program.keys(Example, "part.")}
    assert rows == {
        "part.name": ("text", "required", ""),
        "part.share": ("number", "`0.25`", "of what is there"),
        "part.limit": ("integer or null", "`null`", "Above it, in two lines."),
        "part.inner.rank": ("integer", "`8`", ""),
        "part.reducer": ("`none`, `pool`, `resample`, `merge`, `saliency`", "`none`", ""),
        "part.size": ("integer", "`2`", "변의 길이; only with `part.reducer=pool`"),
        "part.rate": ("number", "→ `llm.rate`", ""),
        "part.folder": ("text", "→ `${paths.cache_dir}/demo`", ""),
        "part.text": ("text", "empty", ""),
        "part.is_on": ("true, false", "`true`", ""),
    }


def test_a_kind_shows_what_it_has_besides() -> None:
    page = program.page()
    mlp = page.partition("### `projector.kind=mlp`\n")[2].partition("\n##")[0]
    assert "| `projector.depth` | integer | `2` | number of linear layers |" in mlp
    assert "projector.checkpoint" not in mlp  # all have it
    assert compose(["projector=mlp"]).projector.temporal.name == "position"
    assert "`local_global` | `position` |" in mlp


def test_check_tells_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "PAGE", tmp_path / "keys.md")
    assert program.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/reference/keys.md is outdated; run python -m tools.keys_page\n"
    assert program.main([]) == 0
    assert program.main(["--check"]) == 0
