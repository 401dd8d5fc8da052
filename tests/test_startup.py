"""What a program shows without work it shows at once: nothing heavy is imported, and help is not composed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlmcap.cli.arguments import COMMANDS, PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "lightning", "transformers", "peft", "numpy", "wandb", "matplotlib")
# Runs a program as `python FILE ARGUMENTS` or a module's main does, and then says on stderr what is loaded.
RUN = """
import json, runpy, sys
name, *arguments = sys.argv[1:]
sys.argv = [name, *arguments]
try:
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def run(*arguments: str, code: str = RUN) -> tuple[str, list[str]]:
    """Output, and the modules that were loaded at the end."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train.py", "--help"), "python train.py encoder=siglip2 llm=qwen3_8b hardware=l4"),
        (("train.py", "encoder=clip", "-h"), "python train.py encoder=siglip2 llm=qwen3_8b hardware=l4"),
        (("evaluate.py", "--help"), "python evaluate.py checkpoint="),
        (("train.py", "--cfg", "job", "encoder=siglip2"), "google/siglip2-so400m-patch14-384"),
        (("vlmcap.cli", "--help"), "COMMAND"),
        (("vlmcap.cli", "train", "--cfg", "job", "encoder=siglip2"), "google/siglip2-so400m-patch14-384"),
        *((("vlmcap.cli", name, "--help"), f"vlmcap {name} ") for name in PROGRAMS),
        *((("vlmcap.cli", command.name, "--help"), f"vlmcap {command.name}") for command in COMMANDS),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_loaded(arguments: tuple[str, ...], expected: str) -> None:
    output, modules = run(*arguments)
    assert expected in output
    assert "vlmcap.config" in modules or arguments[0] == "vlmcap.cli", "the list of modules is that of another process"
    assert [name for name in HEAVY if name in modules] == []


@pytest.mark.slow
def test_the_names_are_those_of_modules_and_work_does_load_them() -> None:
    assert all(importlib.util.find_spec(name) for name in HEAVY)
    imports = "import json, sys, vlmcap.training.run, vlmcap.training.module"
    code = f"{imports}; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    assert {"torch", "lightning", "numpy"} <= set(run(code=code)[1])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_help_is_what_hydra_would_print(program: str) -> None:
    code = f"""
import atexit, sys
atexit.register(print, '[]', file=sys.stderr)
sys.argv[1:] = ['--help']
from vlmcap.compose import register_schemas
import {program}
register_schemas()
{program}.main()
"""
    assert run(f"{program}.py", "--help")[0] == run(code=code)[0] != ""


@pytest.mark.slow
def test_the_collector_of_circles_works_after_the_libraries_were_imported() -> None:
    code = """
import gc, json, sys
from vlmcap.libraries import import_libraries
import_libraries(with_adapters=False)
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
assert "peft" not in sys.modules and "lightning" in sys.modules
circle = []; circle.append(circle)
frozen = gc.get_freeze_count()
import_libraries(with_adapters=True)
assert gc.get_freeze_count() <= frozen, "what an earlier run left must not stay"
print(json.dumps([]), file=sys.stderr)
"""
    run(code=code)
