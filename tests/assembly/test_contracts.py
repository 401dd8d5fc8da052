"""The contracts of plugins hold for our own parts, and each is broken by a part that is made to break it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins import GATED, own_registries, plugin_file
from tests.test_own_components import PARTS
from vlmcap.assembly.contracts import check_component
from vlmcap.cli import main
from vlmcap.plugins import use_plugins

KINDS = ("linear", "mlp", "cross_attention", "perceiver", "c_abstractor", "pixel_shuffle")


@pytest.fixture
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with own_registries(monkeypatch):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_projectors_hold_them(kind: str) -> None:
    import vlmcap.models.projectors  # noqa: F401 - registers them

    assert [outcome for outcome in check_component("projector", kind) if outcome.problem] == []


LINE = "        return self.down(F.silu(self.gate(tokens)) * self.up(tokens))\n"
INIT = "        super().__init__()\n"


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize(
    ("old", "new", "contract", "words"),
    [
        (
            LINE,
            f"{LINE[:-1]}[:, :, ::2]\n",
            "num_tokens",
            r"forward gives \(2, 128, 48\), num_tokens states \(2, 256, 48\)",
        ),
        (
            INIT,
            f"{INIT}        self.idle = nn.Linear(2, 2)\n",
            "a gradient",
            "no gradient reaches projection.idle.weight",
        ),
        ("self.up(tokens))", "self.up(tokens - tokens.mean(0)))", "clips of a batch", "differs by"),
        (
            INIT,
            f"{INIT}        self.norm = nn.BatchNorm1d(32)\n",
            "a gradient",
            "no gradient reaches projection.norm.weight",
        ),
        ("self.up(tokens))", "self.up(tokens)) + torch.rand(1)", "equal input", "two calls differ"),
        ("self.up(tokens))", "self.up(tokens)) + self.table", "its state_dict", "register every weight"),
        ("self.up(tokens))", "self.up(tokens)) + torch.ones(48, device='cpu')", "it runs on the meta device", "device"),
        ("expansion: int = 2", "expansion: int = -1", "its settings", "negative"),
    ],
)
def test_a_part_that_breaks_one_is_found(old: str, new: str, contract: str, words: str, tmp_path: Path) -> None:
    source = GATED.replace(old, new).replace("import torch.nn", "import torch\nimport torch.nn")
    source = source.replace(INIT, f"{INIT}        self.table = torch.randn(48)\n")
    assert source != GATED
    use_plugins([plugin_file(tmp_path, "my_gated", source)])
    problems = {
        outcome.contract: outcome.problem for outcome in check_component("projector", "gated") if outcome.problem
    }
    found = [problem for text, problem in problems.items() if text.startswith(contract)]
    assert len(found) == 1
    assert re.search(words, found[0])


@pytest.mark.slow
@pytest.mark.usefixtures("_registries")
def test_the_command_prints_a_table_and_exits_with_one_where_something_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check-plugin", plugin_file(tmp_path, "my_gated", GATED), "projector.expansion=3"])
    told = capsys.readouterr().out
    assert told.count("projector=gated") == 8
    assert "All 8 checks passed." in told
    bad = GATED.replace('"gated"', '"lame"').replace(LINE, LINE[:-1] + "[:, :, ::2]\n")
    with pytest.raises(SystemExit) as exit_:
        main(["check-plugin", plugin_file(tmp_path, "my_lame", bad)])
    assert exit_.value.code == 1
    told = capsys.readouterr().out
    assert "failed: F=4, P=8 × 8: forward gives (2, 128, 48)" in told
    assert "projector=gated" not in told


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize(
    ("old", "new", "contract", "words"),
    [
        (".flatten(2)", ".flatten(2)[..., ::2]", "it gives the stated grid", r"features returned \(4, 8, 32\)"),
        ("self.cells(pixels)", "self.cells(pixels - pixels.mean(0))", "clips of a batch", "differs by"),
        ('kind: str = "cells"', 'kind: str = "cells"; checkpoint: str = ""', "equal frames", "random after every load"),
        (
            "return encoder",
            "return encoder.to_empty(device='cpu')",
            "it is built on the meta",
            "reads weights although there is no folder",
        ),
    ],
)  # fmt: skip
def test_an_encoder_that_breaks_one_is_found(old: str, new: str, contract: str, words: str, tmp_path: Path) -> None:
    source = PARTS["my_cells"].replace(old, new)
    assert source != PARTS["my_cells"]
    use_plugins([plugin_file(tmp_path, "my_cells", source)])
    problems = {outcome.contract: outcome.problem for outcome in check_component("encoder", "cells") if outcome.problem}
    (found,) = [problem for text, problem in problems.items() if text.startswith(contract)]
    assert re.search(words, found)


@pytest.mark.usefixtures("_registries")
def test_metrics_and_formats_that_break_one_are_found(tmp_path: Path) -> None:
    metric = PARTS["my_metric"].replace(
        '[float(text.count("?")) for text in predictions]', "float(len(predictions[0]))"
    )
    data = PARTS["my_format"].replace("yield Record(", "yield dict(clip=")
    data = data.replace('(root / settings.file).read_text(encoding="utf-8")', r'"a\tb\tc\td"')
    use_plugins([plugin_file(tmp_path, "my_metric", metric), plugin_file(tmp_path, "my_format", data)])
    parts = (("metric", "question_marks"), ("data", "lines"))
    problems = [outcome.problem for part in parts for outcome in check_component(*part) if outcome.problem]
    assert len(problems) == 2
    assert problems[0].startswith("clips in another order differ by")
    assert problems[1] == "it gives dict, expected Record or Skipped"
