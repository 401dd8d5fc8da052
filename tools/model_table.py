"""Writes docs/reference/models.md, the page of everything that `conf/` names.

    python -m tools.model_table                  write the page
    python -m tools.model_table --check          exit with 1 when it is not current
    python -m tools.model_table --measured FILE  first take the parity errors out of a JUnit file

The errors come from the tests themselves: a parity test calls pytest's `record_property("parity:encoder:clip", error)`,
and `pytest -o junit_family=xunit1 --junit-xml=FILE tests/models` writes all that was recorded; names that were not are
dropped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import torch

from tools import model_page as table
from vlmcap.assembly.components import encoder_options, projector_sizes
from vlmcap.compose import CUSTOM, compose
from vlmcap.config import Config, PretrainedVlmConfig
from vlmcap.config_files import group_choices
from vlmcap.demo.prepare import TINY_ENCODERS
from vlmcap.models.encoders import VisionEncoder, build_encoder
from vlmcap.models.known import known_model_config
from vlmcap.models.projectors import ProjectorSizes

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PARITY = DOCS / "reference" / "models.md", DOCS / "parity.json"
HEAD = """# Models

<!-- Made by `python -m tools.model_table`; edit the YAML files under conf/ instead. -->

Every model that a group names. Sizes and contexts come from the checkpoints' configurations, built in the class named,
without weights and without a download. A parity test builds the class with tiny random weights, loads it as a
checkpoint is loaded, and compares it with the reference implementation; *error* is the largest absolute difference that
it measured. Published weights were not run for it. Licenses are a first hint and were not all checked at the source:
read the checkpoint's page before you use one.

"""
NOT_OFFERED = """## Not offered

| checkpoint | why |
| --- | --- |
| kakaocorp/kanana-1.5-2.1b-instruct-2505 | 24 heads of 128 on a width of 1 792, which transformers' Llama refuses |
| naver-hyperclovax/HyperCLOVAX-SEED-Think-32B, -Vision-Instruct-3B | whole vision-language models with remote code |
| LGAI-EXAONE/EXAONE-3.5-* | remote code, no class in transformers |
"""


def page() -> str:
    """The whole page, as it should be now."""
    parity = table.read_parity(PARITY)
    configs = list(_configurations())
    encoders = [(config.encoder, _encoder(config)) for config in _distinct(configs, "encoder")]
    whole = [config.model for config in _distinct(configs, "model") if isinstance(config.model, PretrainedVlmConfig)]
    sections = {
        "Encoders": (table.ENCODER_HEADER, [table.encoder_row(*encoder, parity) for encoder in encoders]),
        "Projectors": (
            table.PROJECTOR_HEADER,
            [
                table.projector_row(config.projector, _example(config), parity)
                for config in _distinct(configs, "projector")
            ],
        ),
        "Language models": (
            table.LLM_HEADER,
            [table.llm_row(config.llm, parity) for config in _distinct(configs, "llm")],
        ),
        "Whole models": (table.MODEL_HEADER, [table.model_row(model, parity) for model in whole]),
        "Hardware": (
            table.HARDWARE_HEADER,
            [table.hardware_row(config.hardware) for config in _distinct(configs, "hardware")],
        ),
    }
    body = "\n".join(
        f"## {title}\n\n{table.markdown_table(header, rows)}" for title, (header, rows) in sections.items()
    )
    return f"{HEAD}{body}\n{NOT_OFFERED}"


def read_measured(file: Path) -> dict[str, dict[str, str | float]]:
    """Test and error of every `parity:` property in a JUnit file of pytest.

    The largest where a name was recorded more than once.
    """
    found: dict[str, dict[str, str | float]] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        for recorded in case.iter("property"):
            name, error = recorded.attrib["name"], recorded.attrib["value"]
            key = name.removeprefix("parity:")
            if key != name and float(error) >= found.get(key, {"error": -1.0})["error"]:  # type: ignore[operator]
                found[key] = {
                    "test": f"{case.attrib['file']}::{case.attrib['name'].partition('[')[0]}",
                    "error": float(error),
                }
    return dict(sorted(found.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.model_table", description="Write docs/reference/models.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is not current")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="JUnit file with the errors that parity tests recorded"
    )
    chosen = parser.parse_args(arguments)
    if chosen.measured:
        PARITY.write_text(json.dumps(read_measured(chosen.measured), indent=2) + "\n", encoding="utf-8")
    text = page()
    if chosen.check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.name} is not current; run python -m tools.model_table", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def _names(group: str) -> list[str]:
    return [name for name in group_choices(group) if name not in (*TINY_ENCODERS, CUSTOM, "assembled")]


def _configurations() -> Iterator[Config]:
    """Each name of each group at least once; several groups a configuration, as composing takes a third of a second."""
    groups = ("encoder", "projector", "llm", "hardware")
    for chosen in itertools.zip_longest(*map(_names, groups)):
        names = [f"{group}={name}" for group, name in zip(groups, chosen, strict=True) if name]
        yield compose([*names, "hardware.frame_stack=1"])  # the CPU's would join the frames of the projectors' example
    for name in _names("model"):
        yield compose([f"model={name}"])


def _distinct(configs: Sequence[Config], group: str) -> list[Config]:
    """One configuration for each of the group's names, in their order."""
    first = {getattr(config, group).name: config for config in reversed(configs)}
    return [first[name] for name in _names(group)]


def _encoder(config: Config) -> VisionEncoder:
    with torch.device("meta"):
        return build_encoder(known_model_config(config.encoder.checkpoint), encoder_options(config))


def _example(config: Config) -> ProjectorSizes:
    """The sizes that the table's head names."""
    encoder = SimpleNamespace(embed_dim=1024, grid=(24, 24), possible_grids=lambda num_frames: [(8, 24, 24)])
    return projector_sizes(config, encoder, out_dim=4096, num_prompt_tokens=32)


if __name__ == "__main__":
    sys.exit(main())
