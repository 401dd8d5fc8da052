"""The components of docs/howto/own_components.md: each is short, holds the contracts, and is chosen by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins import own_registries, plugin_file
from vlmcap.assembly.contracts import check_component
from vlmcap.compose import compose
from vlmcap.config.kinds import MAKERS
from vlmcap.plugins import use_plugins

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "own_components.md"
TEXT = PAGE.read_text(encoding="utf-8")
PARTS = {name: source for name, source in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT, re.DOTALL)}


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with own_registries(monkeypatch):
        yield


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_short_and_holds_the_contracts(name: str, tmp_path: Path) -> None:
    import vlmcap.models.projectors  # noqa: F401 - whose kinds are not counted

    assert sum(bool(line.strip()) for line in PARTS[name].splitlines()) < 30
    before = {(group, kind) for group, kinds in MAKERS.items() for kind in kinds}
    use_plugins([plugin_file(tmp_path, name, PARTS[name])])
    ((group, kind),) = {(group, kind) for group, kinds in MAKERS.items() for kind in kinds} - before
    assert [outcome for outcome in check_component(group, kind) if outcome.problem] == []
    if group != "metric":
        needs = {"llm": ["llm.checkpoint=tiny"], "encoder": ["encoder.checkpoint=x"], "data": ["data.root=x"]}.get(
            group, []
        )
        assert getattr(compose([f"{group}={kind}", *needs]), group).kind == kind


def test_every_kind_of_part_is_shown(tmp_path: Path) -> None:
    import vlmcap.models.projectors  # noqa: F401 - whose kinds are not counted

    before = {(group, kind) for group, kinds in MAKERS.items() for kind in kinds}
    use_plugins([plugin_file(tmp_path, name, source) for name, source in PARTS.items()])
    groups = {group for group, kinds in MAKERS.items() for kind in kinds if (group, kind) not in before}
    assert groups == {"projector", "encoder", "llm", "metric", "data"}
