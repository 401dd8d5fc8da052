"""Writes the pages and tables of the documentation that repeat facts of the code.

    python -m tools.site_pages            write them
    python -m tools.site_pages --check    exit with 1 when one is not current

- `docs/reference/commands.md`: the help of every command, from its parser.
- `docs/reference/choices.md`: every name that a group takes, from the first line of its file under `conf/`.
- The table "your GPU, this command" of both READMEs and of `docs/howto/memory.md`, from the plans of
  `experiment=recommended_*`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.model_tables import markdown_table, page_parser
from vlmcap.cli.arguments import COMMANDS
from vlmcap.config_files import group_choices
from vlmcap.config_unread import NO_DATA
from vlmcap.planning.known_data import planned
from vlmcap.planning.make_plan import make_plan
from vlmcap.planning.sweep_budget.make_sweep_plan import plan_sweep
from vlmcap.program import help_text

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
WIDTH = 100  # columns of a command's help
UNCHOSEN = ("native",)  # comes with `model=`, and is not for choosing

COMMANDS_HEAD = """# Commands

<!-- Made by `python -m tools.site_pages` from the parsers of the commands; edit those instead. -->

`vlmcap COMMAND` works in any folder, from a checkout and from an installed package. In a checkout,
`python train.py` and `python evaluate.py` are `vlmcap train` and `vlmcap evaluate`. Every command takes overrides as
`KEY=VALUE`: [Keys](keys.md) lists the keys, and [Choices](choices.md) the names that a group takes.

| exit code | meaning |
| --- | --- |
| 0 | success |
| 1 | a finding: a plan that does not fit, a problem that `doctor` found, a job of a sweep that failed |
| 2 | a mistake, which one sentence on stderr explains |
| 128 + signal | a signal stopped the run, and its state was saved: 130 for Ctrl-C, 143 for SIGTERM |

"""
CHOICES_HEAD = """# Choices

<!-- Made by `python -m tools.site_pages` from the files under conf/; edit their first lines instead. -->

`python train.py GROUP=NAME` takes a name from this page. **Bold** is the default. A file of your own in
`DIR/GROUP/NAME.yaml` is a choice too, with `--config-dir DIR` ([Configuration files](configuration.md)). Sizes,
licenses and measured errors of the models are in [Models](models.md).

"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A row of the table of GPUs."""

    name: str
    experiment: str


GPUS = (
    Gpu("T4, 16 GB", "recommended_t4"),
    Gpu("L4, 24 GB", "recommended_l4"),
    Gpu("A100, 40 GB", "recommended_a100"),
    Gpu("H100, 80 GB", "recommended_h100"),
)
GPU_TABLE = re.compile(r"(?<=<!-- gpu table -->\n).*?(?=<!-- /gpu table -->)", re.DOTALL)
GPU_HEADERS = {
    "en": ("GPU", "command", "model", "planned memory, GiB", "planned hours"),
    "ko": ("GPU", "명령", "모델", "계획한 메모리, GiB", "계획한 시간"),
}
GPU_DOCUMENTS = {"README.md": "en", "README.ko.md": "ko", "docs/howto/memory.md": "en"}


def commands_page() -> str:
    """The page of all commands with their help."""
    os.environ["COLUMNS"] = str(WIDTH)  # which argparse reads
    helps = {f"vlmcap {name}": help_text(name) for name in ("train", "evaluate")}
    helps |= {parser.prog: parser.format_help() for parser in _parsers()}
    return COMMANDS_HEAD + "\n".join(f"## `{name}`\n\n```text\n{text.strip()}\n```\n" for name, text in helps.items())


def _parsers() -> Iterator[argparse.ArgumentParser]:
    """The parser of every command, and behind it those of its actions (`vlmcap cache build`)."""
    for command in COMMANDS:
        text = f"{command.help[0].upper()}{command.help[1:]}."
        parser = argparse.ArgumentParser(prog=f"vlmcap {command.name}", description=text)
        command.add_arguments(parser)
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def choices_page() -> str:
    """The page of every group and its names."""
    chosen = dict(
        re.findall(r"^  - (?:override /)?(\w+): (\w+)", (ROOT / "conf" / "train.yaml").read_text("utf-8"), re.M)
    )
    groups = sorted(folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir())
    return CHOICES_HEAD + "\n".join(
        f"## `{group}`\n\n"
        + markdown_table(
            ("name", ""),
            [_choice(group, name, name == chosen.get(group)) for name in group_choices(group) if name not in UNCHOSEN],
        )
        for group in groups
    )


def _choice(group: str, name: str, is_default: bool) -> tuple[str, str]:
    lines = (ROOT / "conf" / group / f"{name}.yaml").read_text("utf-8").splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#") and "@package" not in line]
    sentence = re.match(r".*?[.?](?= |$)", " ".join(comments))  # the first one, which says what the file is
    return (f"**`{name}`**" if is_default else f"`{name}`"), sentence[0] if sentence else comments[0]


def gpu_table(language: str) -> str:
    """The table of GPUs: command, parts, planned memory and hours.

    Args:
        language: "en" or "ko".
    """
    rows = []
    for gpu in GPUS:
        overrides = [f"experiment={gpu.experiment}"]
        config = planned([NO_DATA, *overrides])
        plan = make_plan(config)
        hours = plan_sweep(overrides).total_h
        parts = f"{config.encoder.name} + {config.projector.name} + {config.llm.name}"
        memory = f"{plan.peak_gib:.1f} / {plan.device.usable_gib:.1f}"
        rows.append(
            (
                gpu.name,
                f"`python train.py experiment={gpu.experiment} data.root=data/aihub`",
                parts,
                memory,
                f"{hours:.0f}",
            )
        )
    return markdown_table(GPU_HEADERS[language], rows)


def pages() -> Mapping[Path, str]:
    """Path to text of everything that this tool writes, as it should be now."""
    made = {REFERENCE / "commands.md": commands_page(), REFERENCE / "choices.md": choices_page()}
    tables = {language: gpu_table(language) for language in GPU_HEADERS}
    for name, language in GPU_DOCUMENTS.items():
        made[ROOT / name] = GPU_TABLE.sub(lambda _, text=tables[language]: text, (ROOT / name).read_text("utf-8"))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the pages; returns the exit code."""
    is_check = page_parser("site_pages", "Write what docs repeat of the code.").parse_args(arguments).check
    stale = []
    for path, text in pages().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not is_check:
            path.write_text(text, encoding="utf-8")
    if is_check and stale:
        print(f"{', '.join(stale)}: not current; run python -m tools.site_pages", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
