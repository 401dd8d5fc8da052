"""What the documents tell people to type works, and what they link to exists."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.thinned import thinned
from vlmcap.compose import compose
from vlmcap.program import help_text

ROOT = Path(__file__).resolve().parents[1]
READING = ROOT / "docs" / "reference" / "configuration.md"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "README.ko.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?python (train|evaluate)\.py\b(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"^`([\w./]+\.yaml)`:\n\n```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^\$ python (\w+\.py) (.*)\n((?:(?!\$ |```).*\n)+)", re.MULTILINE)  # a command and what it prints


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Program and arguments of every line in a code block that starts one of the two programs."""
    lines = "\n".join(BLOCK.findall(text)).replace("\\\n", " ")
    return [(program, shlex.split(arguments, comments=True)) for program, arguments in COMMAND.findall(lines)]


def runs(arguments: list[str]) -> Iterator[list[str]]:
    """The overrides of each run: `-m` tries every combination of the values that commas part."""
    overrides = [
        argument for argument in arguments if "=" in argument and not argument.startswith("-")
    ]  # `--cfg job` is none
    if "-m" not in arguments and "--multirun" not in arguments:
        yield overrides
        return
    listed = [one for one in overrides if "(" not in one]  # an interval has no values to list
    pairs = [one.partition("=") for one in listed]
    # Commas inside of brackets, as in encoder=[siglip2,dinov3_l], part no values.
    choices = [[f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)] for key, _, values in pairs]
    yield from map(list, itertools.product(*choices))


def text_of(document: Path) -> str:
    """A document without what is run for real below."""
    text = document.read_text("utf-8")
    return SHOWN.sub("", text) if document == READING else text


WRITTEN = [
    command
    for document in DOCUMENTS
    for command in commands(text_of(document))
    if "--plugin" not in command[1]  # tests/test_own_components.py runs those files
]
COMMANDS = sorted({(program, tuple(run)) for program, arguments in WRITTEN for run in runs(arguments)})
FIRST = {
    (program, tuple(next(runs(arguments)))) for program, arguments in WRITTEN
}  # of the runs that each command starts


@pytest.mark.parametrize(
    ("program", "overrides"),
    thinned(COMMANDS, lambda command: command in FIRST),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_command_composes(program: str, overrides: tuple[str, ...]) -> None:
    compose(list(overrides), name=program)


def test_the_commands_were_found() -> None:
    assert ("train", ("encoder=siglip2", "llm=qwen3_8b", "hardware=l4")) in COMMANDS
    assert {program for program, _ in COMMANDS} == {"train", "evaluate"}


def test_commands_are_read_out_of_a_document() -> None:
    text = "```bash\npython train.py -m a=1,2 b=3 \\\n  c=4  # why\nls\n```\n`python train.py d=5`\n"
    assert commands(text) == [("train", ["-m", "a=1,2", "b=3", "c=4"])]
    assert list(runs(["-m", "a=1,2", "b=3"])) == [["a=1", "b=3"], ["a=2", "b=3"]]
    assert list(runs(["a=[1,2]"])) == [["a=[1,2]"]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_what_a_document_links_to_exists(document: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(document.read_text("utf-8")) if "://" not in link]
    assert [target for target in targets if target and not (document.parent / target).exists()] == []


def test_the_files_that_are_shown_are_those_of_conf() -> None:
    shown = {path: content for path, content in FILE.findall(READING.read_text("utf-8")) if path.startswith("conf/")}
    assert shown == {path: (ROOT / path).read_text("utf-8") for path in shown}
    assert "conf/projector/mlp4.yaml" in shown


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that docs/reference/configuration.md tells people to write."""
    folder = tmp_path_factory.mktemp("reading")
    for path, content in FILE.findall(READING.read_text("utf-8")):
        if not path.startswith("conf/"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("program", "arguments", "expected"), SHOWN.findall(READING.read_text("utf-8")), ids=lambda value: value[:70]
)
def test_a_command_prints_what_is_shown(own_files: Path, program: str, arguments: str, expected: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / program), *shlex.split(arguments)]
    done = subprocess.run(
        command, cwd=own_files, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout + done.stderr).strip() == expected.strip()


def test_the_table_of_folders_names_groups() -> None:
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    named = set(re.findall(r"`(\w+)/`", READING.read_text("utf-8").partition("## A file")[0])) - {"conf"}
    assert named == groups


def test_the_help_names_every_choice() -> None:
    words = set(re.findall(r"\w+", help_text("train")))
    for group in (ROOT / "conf").iterdir():
        names = {path.stem for path in group.glob("*.yaml")} - {"native"}  # which comes with `model=`
        assert names <= words, group.name


def test_both_readmes_have_the_same_commands() -> None:
    """Hand-kept copies drift apart: the Korean README has every command of the English one, and no other."""
    english, korean = (
        [
            line.partition("#")[0].rstrip()
            for block in BLOCK.findall((ROOT / name).read_text("utf-8"))
            for line in block.splitlines()
        ]
        for name in ("README.md", "README.ko.md")
    )
    assert korean == english


def test_the_korean_readme_has_the_numbers_of_the_english_one() -> None:
    rows = {
        "CIDEr (길이 벌점 없음)": "CIDEr (no length penalty)",
        "사실 정확도 평균": "fact: mean",
        "방향": "fact: direction",
        "물체": "fact: object",
    }
    english, korean = (_cells((ROOT / name).read_text("utf-8")) for name in ("README.md", "README.ko.md"))
    assert {name: korean[name] for name in rows} == {name: english[rows[name]][:2] for name in rows}


def _cells(text: str) -> dict[str, list[str]]:
    """The numbers of each row of the demo's table, by the row's name."""
    table = text.partition("<!-- demo table -->")[2].partition("<!-- /demo table -->")[0]
    lines = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_every_korean_page_has_an_english_one() -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.ko.md")]
    assert [page.name for page in pages if not page.with_name(page.name.replace(".ko.md", ".md")).is_file()] == []
    assert {page.name for page in pages} >= {
        "index.ko.md",
        "troubleshooting.ko.md",
        "glossary.ko.md",
        "architecture.ko.md",
    }


def test_the_korean_glossary_has_the_words_of_the_english_one() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text.partition("[start:glossary]")[2].partition("[end:glossary]")[0]
    words = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    korean = {
        line.split("|")[2].strip()
        for line in (ROOT / "docs" / "glossary.ko.md").read_text("utf-8").splitlines()
        if line.startswith("| ")
    }
    assert [word for word in words if word not in korean] == []
