"""Imports go one way, and the heavy or opinionated libraries stay where the design puts them.

    train.py, evaluate.py, cli -> measuring, spectrum, sweeping, reporting -> training -> planning -> assembly, demo
        -> models, data, metrics -> compose, config_errors, config_files, config
        -> types, errors, files, locks, terminal, libraries, determinism

Three kinds of import are told apart: *eager* (runs when the module is imported), *lazy* (inside a function) and
*typing* (under `if TYPE_CHECKING:`). Directions, libraries and circles count all three: whoever reads a file must know
the file that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from tools.import_graph import ROOT, Import, all_imports, find_cycle, native_files, read_imports

BASE = {"types", "errors", "files", "locks", "terminal", "libraries", "determinism"}
PARTS = {"models", "data", "metrics"}
COMPOSED = BASE | {
    "config",
    "config_errors",
    "config_files",
    "config_hash",
    "config_joined",
    "config_saved",
    "config_unread",
    "overrides",
    "plugins",
    "compose",
}
CONFIGURED = COMPOSED | PARTS | {"sweep_syntax"}
TRAINED = CONFIGURED | {
    "demo",
    "assembly",
    "planning",
    "training",
    "",
}  # "" is vlmcap/__init__.py, which has the version
FEATURES = {"measuring", "spectrum", "reporting", "sweeping", "program"}
# What each part of the package may import beside itself; "train" and "evaluate" are the programs.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "config": set(),
    "terminal": set(),
    "libraries": set(),
    "types": {"errors"},
    "locks": {"errors", "files", "terminal"},
    "determinism": {"errors", "libraries"},
    **{part: BASE | {"config"} for part in PARTS},
    "overrides": BASE | {"config", "config_joined"},
    "plugins": BASE | {"config"},
    "config_files": BASE | {"config", "plugins"},
    "config_joined": BASE | {"config", "config_files"},
    "config_errors": BASE | {"config", "overrides", "config_files"},
    "config_unread": BASE | {"config", "overrides"},
    "compose": COMPOSED - {"compose", "config_hash", "config_saved"},
    "config_hash": COMPOSED - {"config_hash"},
    "config_saved": COMPOSED - {"config_saved"},
    "program": COMPOSED,
    "sweep_syntax": COMPOSED,
    "demo": CONFIGURED,
    "assembly": CONFIGURED | {"demo"},
    "planning": CONFIGURED | {"demo", "assembly"},
    "training": TRAINED - {"training"},
    "measuring": TRAINED,
    "spectrum": TRAINED,
    "reporting": PARTS | BASE | {"config"},
    "sweeping": TRAINED | {"program"},
    "": TRAINED - {""},
    "cli": TRAINED | FEATURES,
    **{script: {"cli", "program"} for script in ("train", "evaluate")},
    "__main__": {"cli"},
}
# Third-party libraries that a part does not know.
UNKNOWN_TO: dict[str, set[str]] = {
    "models": {"lightning", "pytorch_lightning", "lightning_fabric", "wandb"},
    "data": {"wandb"},
    "metrics": {"torch", "torchmetrics", "lightning", "pytorch_lightning", "transformers", "wandb"},
}
# Libraries that only these parts know.
ONLY_IN: dict[str, set[str]] = {
    "hydra": {"cli", "overrides", "compose", "program", "sweeping", "sweep_syntax", "training"},
    "omegaconf": {
        "cli",
        "compose",
        "config_errors",
        "config_joined",
        "config_saved",
        "config_unread",
        "program",
        "sweeping",
        "config",
        "training",
    },
}
METRIC_MODULE = re.compile(r"vlmcap\.metrics\.(torchmetrics(_\w+)?|metric|metrics)")
TORCH = {"torch", "torchmetrics"}
MODEL_SCORES = "vlmcap.metrics.model_based"  # loads pretrained models, inside its functions


def part_of(module: str) -> str:
    """`vlmcap.models.captioner` -> `models`, `vlmcap` -> ``, `train` -> `train`."""
    names = module.split(".")
    return names[0] if names[0] != "vlmcap" else ".".join(names[1:2])


def direction_errors(imports: Iterable[Import]) -> list[str]:
    errors = []
    for i in imports:
        source = part_of(i.module)
        is_ours = i.target.split(".")[0] in {"vlmcap", "train", "evaluate"}
        if not is_ours or source not in MAY_IMPORT:
            continue
        if part_of(i.target) != source and part_of(i.target) not in MAY_IMPORT[source]:
            allowed = ", ".join(sorted(MAY_IMPORT[source])) or "nothing of the package"
            errors.append(f"{i.module}:{i.line} imports {i.target} ({i.kind}); it may import: {allowed}")
    return errors


def library_errors(imports: Iterable[Import]) -> list[str]:
    errors = []
    for i in imports:
        part, library = part_of(i.module), i.target.split(".")[0]
        if library in ONLY_IN and part not in ONLY_IN[library]:
            errors.append(f"{i.module}:{i.line} imports {library}; only {', '.join(sorted(ONLY_IN[library]))} may")
        is_excused = (
            part == "metrics" and library in TORCH and (i.kind == "typing" or METRIC_MODULE.fullmatch(i.module))
        )
        is_excused = is_excused or (
            i.module == MODEL_SCORES and i.kind != "eager" and library in {"torch", "transformers"}
        )
        if library in UNKNOWN_TO.get(part, set()) and not is_excused:
            errors.append(f"{i.module}:{i.line} imports {library} ({i.kind}), which {part} does not know")
        if (
            part == "metrics"
            and i.kind == "eager"
            and METRIC_MODULE.fullmatch(i.target)
            and not METRIC_MODULE.fullmatch(i.module)
        ):
            errors.append(f"{i.module}:{i.line} imports {i.target}, and torch with it; import it inside a function")
    return errors


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    files = native_files()
    assert "vlmcap" in files, "the package is not where this test looks for it"
    return all_imports(files)


def test_every_module_has_a_place() -> None:
    strangers = [module for module in native_files() if part_of(module) not in MAY_IMPORT]
    assert not strangers, f"say in MAY_IMPORT what these may import: {strangers}"


def test_imports_go_one_way(imports: list[Import]) -> None:
    errors = direction_errors(imports)
    assert not errors, "\n".join(errors)


def test_libraries_stay_in_their_place(imports: list[Import]) -> None:
    errors = library_errors(imports)
    assert not errors, "\n".join(errors)


def test_no_circle(imports: list[Import]) -> None:
    circle = find_cycle(imports)
    assert not circle, " -> ".join(circle)


def test_no_utils() -> None:
    skipped = {"outputs", "multirun", "wandb", "data", "build", "dist", "node_modules"}
    tops = [p for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in skipped]
    files = [
        f
        for top in tops
        for f in (top.rglob("utils*") if top.is_dir() else [top])
        if re.fullmatch(r"_?utils?(\.py)?", f.name)
    ]
    assert not files, f"name these after what they do: {[str(f.relative_to(ROOT)) for f in files]}"


# The rules above are of use only if they catch something.

KNOWN = {
    "vlmcap",
    "vlmcap.training",
    "vlmcap.config",
    "vlmcap.data.decoding.video",
    "vlmcap.metrics.torchmetrics_bleu",
    "vlmcap.types",
    "vlmcap.models",
}
VIOLATIONS = [
    ("vlmcap.models.captioner", "from vlmcap.data.decoding.video import decode"),
    ("vlmcap.models.captioner", "from vlmcap.data import video"),
    ("vlmcap.models.captioner", "from ..data import video"),
    ("vlmcap.models.captioner", "def f():\n    import vlmcap.data.decoding.video"),
    (
        "vlmcap.models.captioner",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmcap.compose import compose",
    ),
    (
        "vlmcap.models.captioner",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vlmcap.data import video",
    ),
    ("vlmcap.models.captioner", "try:\n    import lightning.pytorch as pl\nexcept ImportError:\n    pl = None"),
    ("vlmcap.models.llm.load", "class A:\n    async def f(self):\n        import wandb"),
    ("vlmcap.models.llm.load", "from omegaconf import DictConfig"),
    ("vlmcap.data.decoding.video", "import importlib\nm = importlib.import_module('vlmcap.models')"),
    ("vlmcap.data.decoding.video", "from hydra.utils import instantiate"),
    ("vlmcap.data.decoding.video", "import os, wandb"),
    ("vlmcap.metrics.ngram_scores", "def f():\n    import torch"),
    ("vlmcap.metrics.ngram_scores", "from vlmcap.types import Clip\nfrom vlmcap.models import x"),
    ("vlmcap.metrics.ngram_scores", "from vlmcap.metrics.torchmetrics_bleu import Bleu"),
    ("vlmcap.metrics.torchmetrics_bleu", "import wandb"),
    ("vlmcap.metrics.model_based", "import torch"),
    ("vlmcap.metrics.scores", "def f():\n    import transformers"),
    ("vlmcap.training.module", "import vlmcap.reporting.tables"),
    ("vlmcap.assembly.model", "from vlmcap import training"),
    ("vlmcap.assembly.model", "from vlmcap.planning.peak_memory import Stage"),
    ("vlmcap.planning.peak_memory", "from vlmcap.training.module import CaptioningModule"),
    ("vlmcap.assembly.model", "from omegaconf import OmegaConf"),
    ("vlmcap.planning.peak_memory", "from omegaconf import DictConfig"),
    ("vlmcap.config", "from vlmcap.errors import UserError"),
    ("vlmcap.types", "import vlmcap.config"),
    ("vlmcap.training.run", "import vlmcap.cli"),
    ("vlmcap.training.run", "import train"),
]
HARMLESS = [
    ("vlmcap.models.captioner", "import torch\nfrom vlmcap.types import Batch\nfrom vlmcap.models.llm import load"),
    ("vlmcap.models.captioner", "from vlmcap.config import LlmConfig"),
    ("vlmcap.data.loading.datamodule", "import lightning\nfrom vlmcap.errors import UserError"),
    (
        "vlmcap.metrics.ngram_scores",
        "import numpy\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import math",
    ),
    ("vlmcap.metrics.ngram_scores", "def f():\n    from vlmcap.metrics.torchmetrics_bleu import Bleu"),
    ("vlmcap.metrics.torchmetrics_bleu", "import torch, torchmetrics"),
    ("vlmcap.metrics.model_based", "def f():\n    import torch, transformers"),
    ("vlmcap.training.module", "from vlmcap import config, types\nimport wandb"),
    ("vlmcap.config", "from omegaconf import MISSING"),
    ("vlmcap.sweeping.job", "import hydra\nfrom vlmcap.training.module import CaptioningModule"),
    ("train", "from vlmcap.cli.train import main"),
    ("vlmcap.cli.train", "import hydra\nfrom vlmcap.training import run"),
]


def found_in(module: str, source: str) -> list[str]:
    found = read_imports(module, source, KNOWN)
    return direction_errors(found) + library_errors(found)


@pytest.mark.parametrize(("module", "source"), VIOLATIONS)
def test_a_violation_is_caught(module: str, source: str) -> None:
    assert len(found_in(module, source)) == 1


@pytest.mark.parametrize(("module", "source"), HARMLESS)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert found_in(module, source) == []


@pytest.mark.parametrize(
    "last",
    ["import vlmcap.data.a", "def f():\n    import vlmcap.data.a", "if TYPE_CHECKING:\n    from vlmcap.data import a"],
)
def test_a_circle_is_caught(last: str) -> None:
    modules = {"vlmcap.data.a", "vlmcap.data.b", "vlmcap.data.c"}
    sources = {
        "vlmcap.data.a": "from vlmcap.data import b",
        "vlmcap.data.b": "def f():\n    from . import c",
        "vlmcap.data.c": last,
    }
    circle = find_cycle(i for m, s in sources.items() for i in read_imports(m, s, modules))
    assert circle == ["vlmcap.data.a", "vlmcap.data.b", "vlmcap.data.c", "vlmcap.data.a"]
