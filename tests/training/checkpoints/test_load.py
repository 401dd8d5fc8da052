"""Captions from a checkpoint alone, in a process that has no Lightning."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.checkpoints.untrained import write_checkpoint
from vlmcap.assembly.clips import load_splits
from vlmcap.config import Config, Split
from vlmcap.demo.prepare import prepare
from vlmcap.training.checkpoints.load import load_captioner

ROOT = Path(__file__).resolve().parents[3]
ABSENT = ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "torchdata", "wandb", "hydra")
# Nothing of these can be imported, neither here nor in the data workers, which are forked off this process.
WITHOUT = f"import json, sys; sys.modules.update(dict.fromkeys({ABSENT!r}));"
LOAD = "import vlmcap; print(json.dumps(vlmcap.load(sys.argv[1]).caption(sys.argv[2:])))"
COMMAND = "from vlmcap.cli import main; main(['caption', '--checkpoint', *sys.argv[1:]])"


@pytest.fixture(scope="module")
def checkpoint(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A checkpoint whose captions are read by two data workers, and three videos."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = prepare(tiny_config(folder / "run", "cache.enabled=false", "data.num_workers=2"))
    path = folder / "tiny.ckpt"
    write_checkpoint(config, path)
    return path, [clip.video for clip in load_splits(config, [Split.test])["test"][:3]]


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD, COMMAND], ids=["vlmcap.load", "vlmcap caption"])
def test_captioning_needs_no_lightning(checkpoint: tuple[Path, list[str]], code: str) -> None:
    path, videos = checkpoint
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, str(path), *videos],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = load_captioner(path).caption(videos)
    assert len(set(expected)) > 1, "captions that depend on no video would be the same without any data worker"
    if code == LOAD:
        assert json.loads(done.stdout) == expected
    else:
        assert done.stdout.splitlines() == [
            f"{video}\t{caption}" for video, caption in zip(videos, expected, strict=True)
        ]


def test_the_absent_libraries_are_those_that_training_loads() -> None:
    code = f"{WITHOUT} import vlmcap.training.module"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert "import of lightning halted" in done.stderr
