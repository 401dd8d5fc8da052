"""`train.py` on checkpoints of a hub, in a process of its own that knows no other place to take them from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.hub import TOKEN, Hub, commit_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def train(hub: Hub, overrides: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(folder / "hf") | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *overrides,
        "llm.checkpoint=org/tiny",
        "encoder.checkpoint=org/tiny_enc",
    ]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_a_run_by_hub_ids(
    hub: Hub, siglip_folder: Path, llm_folder: Path, real_path: list[str], tmp_path: Path
) -> None:
    hub.add("org/tiny", llm_folder)
    hub.add("org/tiny_enc", siglip_folder)
    done = train(hub, real_path, tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert "val/cider" in json.loads((run / "summary.json").read_text())["scores"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.fetched("org/tiny")
    assert (
        tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / commit_of(llm_folder) / "model.safetensors"
    ).is_file()

    # The token went to the hub, and nowhere else.
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in run.rglob("*") if path.is_file()]
    assert written
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)

    # A second run without the hub takes what is there.
    hub.repositories.clear()
    again = train(hub, [*real_path, f"paths.output_dir={tmp_path / 'again'}"], tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("gated, no account", "'org/tiny_enc' is gated and no account is logged in"),
        ("hang", "stopped answering when asked for 'org/tiny_enc'"),
    ],
)
def test_a_run_that_cannot_have_its_checkpoint(
    hub: Hub, siglip_folder: Path, llm_folder: Path, real_path: list[str], tmp_path: Path, fault: str, expected: str
) -> None:
    hub.add("org/tiny", llm_folder)
    hub.add("org/tiny_enc", siglip_folder).fault = fault
    done = train(hub, real_path, tmp_path)
    assert done.returncode == 2, done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert expected in sentence
    assert "encoder.checkpoint" in sentence
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
