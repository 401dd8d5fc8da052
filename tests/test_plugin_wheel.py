"""A distribution with a projector and an encoder is built, installed, and used by programs that do not know it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_own_components import PARTS
from vlmcap.plugins import PLUGINS_VARIABLE

pytestmark = pytest.mark.slow

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[tool.setuptools]
packages = ["vlm_parts"]
[project]
name = "vlm-parts"
version = "3.1"
[project.entry-points."vlmcap.projectors"]
gated = "vlm_parts.my_gated:GatedProjector"
[project.entry-points."vlmcap.encoders"]
cells = "vlm_parts.my_cells:make_cells"
"""
SMALL = [
    "data.demo.num_train=4", "data.demo.num_val=2", "data.demo.num_test=2", "data.num_frames=2", "data.batch_size=2",
    "tuning.align_epochs=0", "tuning.epochs=1", "trainer.accumulate_grad_batches=1",
    "llm.max_caption_tokens=16", "llm.max_new_tokens=4", "data.num_workers=0",
]  # fmt: skip
STORY = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_model
import vlmcap
from vlm_parts.my_cells import CellsEncoder
from vlmcap.compose import compose
from vlmcap.cli import main
from vlmcap.training.run import train

overrides, out = json.loads(sys.argv[1]), Path(sys.argv[2])
(out / "cells").mkdir()
(out / "cells" / "config.json").write_text("{}")
save_model(CellsEncoder(4), out / "cells" / "model.safetensors")
main(["plan", *overrides])
train(compose([*overrides, f"paths.output_dir={out / 'run'}"]))
checkpoint = out / "run" / "checkpoints" / "last.ckpt"
main(["export", "--checkpoint", str(checkpoint), "--output", str(out / "export")])
content = torch.load(checkpoint, weights_only=True)
video = next((out / "cache" / "demo").glob("clips-*/test/videos/*.mp4"))
captions = [vlmcap.load(source).caption([video])[0] for source in (checkpoint, out / "export")]
origin = json.loads((out / "export" / "vlmcap" / "origin.json").read_text())
found = {
    "steps": content["global_step"],
    "plugins": content["vlmcap"]["plugins"],
    "exported": origin["plugins"],
    "captions": captions,
}
(out / "found.json").write_text(json.dumps(found))
"""


def environment(*folders: Path) -> dict[str, str]:
    """Of a program that finds modules in these folders, and no plugin by a variable."""
    path = os.pathsep.join(map(str, (*folders, Path(__file__).parents[1])))
    environment = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE}
    return environment | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def test_a_wheel_is_planned_trained_exported_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")  # builds the wheel without a network
    package, target = tmp_path / "source" / "vlm_parts", tmp_path / "installed"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    for name in ("my_gated", "my_cells"):
        (package / f"{name}.py").write_text(PARTS[name], encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(package.parent),
    ]
    subprocess.run(built, check=True, capture_output=True)
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(target), *map(str, tmp_path.glob("*.whl"))],
        check=True,
    )

    overrides = [
        "projector=gated",
        "encoder=cells",
        f"encoder.checkpoint={tmp_path / 'cells'}",
        "projector.frame_stack=1",
        f"paths.cache_dir={tmp_path / 'cache'}",
        *SMALL,
    ]
    command = [sys.executable, "-c", STORY, json.dumps(overrides), str(tmp_path)]
    ran = subprocess.run(command, env=environment(target), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"cells \+ gated \+ tiny", ran.stdout)

    found = json.loads((tmp_path / "found.json").read_text())
    of = {"name": "vlm-parts", "version": "3.1"}
    assert (
        found["plugins"]
        == found["exported"]
        == {"encoder": {"kind": "cells", **of}, "projector": {"kind": "gated", **of}}
    )
    assert found["steps"] == 2
    assert found["captions"][0] == found["captions"][1]

    for source in (tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "export"):  # without the distribution
        load = [sys.executable, "-c", f"import vlmcap; vlmcap.load({str(source)!r})"]
        refused = subprocess.run(load, env=environment(), capture_output=True, text=True, check=False).stderr
        assert (
            "UserError: the checkpoint has encoder=cells of the plugin vlm-parts, which is not loaded; install "
            "vlm-parts 3.1" in refused
        )
