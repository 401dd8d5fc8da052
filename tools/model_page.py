"""Writes docs/reference/models.md, the page of all models and hardware profiles in `conf/`.

    python -m tools.model_page                  write the page
    python -m tools.model_page --check          exit with code 1 if the page is outdated
    python -m tools.model_page --measured FILE  first read the parity errors from a JUnit file

The errors come from the tests: a parity test calls pytest's `record_property("parity:encoder:clip", error)`, and
`pytest -o junit_family=xunit1 --junit-xml=FILE tests/models` writes all recorded errors; earlier ones are dropped.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import torch
import transformers

from tools import combinations
from tools import model_tables as tables
from vlmcap.assembly.components import encoder_options, projector_sizes
from vlmcap.compose import compose
from vlmcap.config import Config, PretrainedVlmConfig
from vlmcap.models.encoders import VisionEncoder, build_encoder
from vlmcap.models.known import known_model_config
from vlmcap.models.pretrained.families import FAMILIES, known_types, obstacle
from vlmcap.models.projectors import ProjectorSizes

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PARITY = DOCS / "reference" / "models.md", DOCS / "parity.json"
HEAD = """# Models

<!-- Made by `python -m tools.model_page`; edit the YAML files under conf/ instead. -->

All names that each group accepts. Sizes and context lengths come from the checkpoints' configurations, built in the
named class without weights and without a download. A parity test builds the class with tiny random weights, loads them
like a checkpoint, and compares the output with the reference implementation; *error* is the largest absolute
difference that it measured. Published weights were not used for it. Licenses are a first hint and were not all checked
at the source: read the checkpoint's page before you use it.

"""
NOT_OFFERED = """## Not offered

| checkpoint | reason |
| --- | --- |
| kakaocorp/kanana-1.5-2.1b-instruct-2505 | 24 heads of 128 at width 1 792, which transformers' Llama class refuses |
| naver-hyperclovax/HyperCLOVAX-SEED-Vision-Instruct-3B, kakaocorp/kanana-1.5-v-3b-instruct | remote code |
| naver-hyperclovax/HyperCLOVAX-SEED-Think-32B, NCSOFT/VARCO-VISION-2.0-1.7B, -14B, llava-hf/llava-onevision-*, \
OpenGVLab/InternVL3_5-*-HF, HuggingFaceTB/SmolVLM2-*, google/gemma-3-4b-it, -12b-it, -27b-it \
| no name, as their sizes were not confirmed at a source; `model=custom` takes them |
| LGAI-EXAONE/EXAONE-3.5-* | remote code, no class in transformers |
| facebook/PE-Core-\\*, PE-Lang-\\*, PE-Spatial-\\* (Perception Encoder) | transformers reads these towers through \
timm, which is no dependency |
| nvidia/C-RADIOv4-SO400M | sizes not confirmed; `encoder=custom` takes them from a `config.json` in the native layout |
"""


def page() -> str:
    """Returns the current text of the page."""
    parity = tables.read_parity(PARITY)
    configs = list(_configurations())
    encoders = [(config.encoder, _encoder(config)) for config in _distinct(configs, "encoder")]
    vlms = [config.model for config in _distinct(configs, "model") if isinstance(config.model, PretrainedVlmConfig)]
    sections = {
        "Encoders": (tables.ENCODER_HEADER, [tables.encoder_row(*encoder, parity) for encoder in encoders]),
        "Projectors": (
            tables.PROJECTOR_HEADER,
            [
                tables.projector_row(config.projector, _example(config), parity)
                for config in _distinct(configs, "projector")
            ],
        ),
        "Language models": (
            tables.LLM_HEADER,
            [tables.llm_row(config.llm, parity) for config in _distinct(configs, "llm")],
        ),
        "Pretrained VLMs": (tables.MODEL_HEADER, [tables.model_row(vlm, parity) for vlm in vlms]),
        "Hardware": (
            tables.HARDWARE_HEADER,
            [tables.hardware_row(config.hardware) for config in _distinct(configs, "hardware")],
        ),
    }
    body = "\n".join(
        f"## {title}\n\n{tables.markdown_table(header, rows)}" for title, (header, rows) in sections.items()
    )
    checked = combinations.section(json.loads(combinations.CHECKED.read_text(encoding="utf-8")))
    return f"{HEAD}{body}\n{checked}\n{NOT_OFFERED}\n{_model_types(parity)}"


def _model_types(parity: Mapping[str, tables.Parity]) -> str:
    """Returns the model types of images and text in the installed transformers, with the reasons of those not taken."""
    taken = [
        (f"`{name}`", f"`{family.kind}`", *tables.parity_cells(parity, f"model:{name}"))
        for name, family in FAMILIES.items()
    ]
    reasons: dict[str, list[str]] = {}
    for name in known_types():
        if name not in FAMILIES:
            reasons.setdefault(obstacle(name), []).append(f"`{name}`")
    refused = [(reason, ", ".join(names)) for reason, names in sorted(reasons.items())]
    return (
        f"Of the {len(known_types())} model types of images and text in transformers {transformers.__version__}, "
        f"`model=custom` takes these:\n\n"
        f"{tables.markdown_table(('model type', 'kind', *tables.PARITY_HEADER), taken)}\n"
        f"The others are refused:\n\n{tables.markdown_table(('reason', 'model types'), refused)}"
    )


def read_measured(file: Path) -> dict[str, dict[str, str | float]]:
    """Reads the test and the error of every `parity:` property in a JUnit file of pytest.

    If a name was recorded more than once, the largest error counts.
    """
    errors: dict[str, dict[str, str | float]] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        for recorded in case.iter("property"):
            name, error = recorded.attrib["name"], recorded.attrib["value"]
            key = name.removeprefix("parity:")
            if key != name and float(error) >= errors.get(key, {"error": -1.0})["error"]:  # type: ignore[operator]
                errors[key] = {
                    "test": f"{case.attrib['file']}::{case.attrib['name'].partition('[')[0]}",
                    "error": float(error),
                }
    return dict(sorted(errors.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    measured = "JUnit file with the errors that parity tests recorded"
    parser = tables.page_parser("model_page", "Write docs/reference/models.md.", measured=measured)
    chosen = parser.parse_args(arguments)
    if chosen.measured:
        PARITY.write_text(json.dumps(read_measured(chosen.measured), indent=2) + "\n", encoding="utf-8")
    text = page()
    return tables.write_or_check(PAGE, text, "model_page", is_check=chosen.check)


def _configurations() -> Iterator[Config]:
    """Yields configurations that contain every name of every group, with several groups each, as composing is slow."""
    groups = ("encoder", "projector", "llm", "hardware")
    for chosen in itertools.zip_longest(*map(combinations.published, groups)):
        names = [f"{group}={name}" for group, name in zip(groups, chosen, strict=True) if name]
        yield compose([*names, "hardware.frame_stack=1"])  # hardware=cpu would stack the frames of the example
    for name in combinations.published("model"):
        yield compose([f"model={name}"])


def _distinct(configs: Sequence[Config], group: str) -> list[Config]:
    """Returns one configuration for each name of a group, in their order."""
    first = {getattr(config, group).name: config for config in reversed(configs)}
    return [first[name] for name in combinations.published(group)]


def _encoder(config: Config) -> VisionEncoder:
    with torch.device("meta"):
        return build_encoder(known_model_config(config.encoder.checkpoint), encoder_options(config))


def _example(config: Config) -> ProjectorSizes:
    """Returns the sizes of the example in the header of the projectors' table."""
    encoder = SimpleNamespace(embed_dim=1024, grid=(24, 24), possible_grids=lambda num_frames: [(8, 24, 24)])
    return projector_sizes(config, encoder, out_dim=4096, num_prompt_tokens=32)


if __name__ == "__main__":
    sys.exit(main())
