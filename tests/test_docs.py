"""What the documents tell people to type works, and what they link to exists."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.thinned import thinned
from vlmcap.compose import compose

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?python (train|evaluate)\.py\b(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Program and arguments of every line in a code block that starts one of the two programs."""
    lines = "\n".join(BLOCK.findall(text)).replace("\\\n", " ")
    return [(program, shlex.split(arguments, comments=True)) for program, arguments in COMMAND.findall(lines)]


def runs(arguments: list[str]) -> Iterator[list[str]]:
    """The overrides of each run: `-m` tries every combination of the values that commas part."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if "-m" not in arguments and "--multirun" not in arguments:
        yield overrides
        return
    listed = [one for one in overrides if "(" not in one]  # an interval has no values to list
    choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in (one.partition("=") for one in listed)]
    yield from map(list, itertools.product(*choices))


WRITTEN = [command for document in DOCUMENTS for command in commands(document.read_text("utf-8"))]
COMMANDS = sorted({(program, tuple(run)) for program, arguments in WRITTEN for run in runs(arguments)})
FIRST = {(program, tuple(next(runs(arguments)))) for program, arguments in WRITTEN}  # of the runs that each command starts


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_what_a_document_links_to_exists(document: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(document.read_text("utf-8")) if "://" not in link]
    assert [target for target in targets if target and not (document.parent / target).exists()] == []
