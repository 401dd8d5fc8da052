"""`python train.py` inside a test, with something quick in place of training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vlmcap.cli.train import main
from vlmcap.config import Config
from vlmcap.program import run_program

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """Runs the program in a folder.

    Args:
        folder: To run in.
        monkeypatch: Puts `train` in the place of training.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, monkeypatch
        self.runs: list[Config] = []
        self.trial: Any = None  # of the search, at the last run

    def __call__(self, arguments: Sequence[str], train: Callable[[Config], float] = lambda config: 0.5) -> int:
        """The exit code; a configuration a run is in `runs`."""
        self.runs = []

        def kept(config: Config, trial: Any = None) -> float:
            self.runs.append(config)
            self.trial = trial
            return train(config)

        self._patch.setattr("vlmcap.training.run.train", kept)
        self._patch.setattr(sys, "argv", ["train.py", *arguments])
        self._patch.chdir(self.folder)
        self._patch.setenv("HYDRA_FULL_ERROR", "1")
        try:
            run_program(main, "train")
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    def sweep_folder(self) -> Path:
        """Of the one sweep under multirun/."""
        (found,) = self.folder.glob("multirun/*/*")
        return found


def statuses(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each job, by the name of its folder."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/status.json"))
    }


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(tmp_path, monkeypatch)
