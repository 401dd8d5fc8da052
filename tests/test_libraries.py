"""Programs choose the CUDA allocator's growing segments and a deterministic workspace before PyTorch is imported.

A user's choice stays.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
# The script is run up to the moment at which PyTorch is first imported, or to its help, which needs none.
_SCRIPT = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("\\nat torch:", *map(os.environ.get, {names}), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def at_torch(program: list[str], given: dict[str, str]) -> str:
    environment = (
        {name: value for name, value in os.environ.items() if name not in _NAMES} | given | {"PYTHONPATH": str(ROOT)}
    )
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.replace("{names}", repr(_NAMES)), *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "program",
    [["train.py", "data.root=unset"], ["evaluate.py", "checkpoint=x.ckpt"], ["vlmcap/cli/__main__.py", "plan"]],
)
def test_segments_grow_by_the_time_pytorch_is_imported(program: list[str]) -> None:
    script, *arguments = program
    assert at_torch([str(ROOT / script), *arguments], {}) == "at torch: expandable_segments:True None :4096:8"


@pytest.mark.parametrize("name", _NAMES)
def test_a_user_s_choice_stays(name: str) -> None:
    others = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True" if name == _NAMES[2] else "None",
        _NAMES[1]: "None",
        _NAMES[2]: ":4096:8",
    }
    expected = ["chosen:1" if name == own else others[own] for own in _NAMES]
    found = at_torch([str(ROOT / "vlmcap/cli/__main__.py"), "plan"], {name: "chosen:1"})
    assert found == f"at torch: {' '.join(expected)}"
