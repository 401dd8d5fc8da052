"""examples/quickstart.ipynb: it runs from the first cell to the last, and what is committed of it is small and public.

`jupyter execute --inplace examples/quickstart.ipynb` writes its outputs.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.test_house import machine_paths
from vlmcap.compose import compose

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells() -> list[Any]:
    return [cell for cell in read().cells if cell.cell_type == "code"]


def test_what_is_committed_is_whole_small_and_names_no_machine() -> None:
    nbformat.validate(read())
    assert NOTEBOOK.stat().st_size < 300_000
    cells = code_cells()
    counts = [cell.execution_count for cell in cells]
    assert counts in (list(range(1, len(cells) + 1)), [None] * len(cells))  # run once from top to bottom, or cleared
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert bool(outputs) == any("image/png" in output.get("data", {}) for output in outputs)
    assert machine_paths(NOTEBOOK.read_text("utf-8")) == []


@pytest.mark.parametrize("sizes", ["SMALL", "FULL", "T4"])
def test_the_sizes_that_it_offers_compose(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which the cell changes
    offered: dict[str, Any] = {}
    exec(code_cells()[0].source, offered)
    config = compose(offered[sizes])
    assert config.hardware.name == ("t4" if sizes == "T4" else "cpu")


@pytest.mark.slow
def test_it_runs_from_the_first_cell_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    commands = shutil.which("vlmcap", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert commands, "the environment has the command `vlmcap`"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("VLMCAP_CACHE_DIR", str(tmp_path / "cache"))
    notebook = read()
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    assert not [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"
    ]
    run = tmp_path / "outputs" / "quickstart"
    assert {"index.html", "summary.json", "predictions"} <= {path.name for path in run.iterdir()}
    text = str([cell.get("outputs") for cell in notebook.cells])
    assert "facts/direction" in text and "model:" in text  # the table of scores, and captions beside frames
