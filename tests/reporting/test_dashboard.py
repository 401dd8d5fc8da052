"""The W&B dashboard and sweep as data; no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmcap.cli import dashboard as command
from vlmcap.cli import main
from vlmcap.cli.dashboard import sweep_definition
from vlmcap.compose import compose
from vlmcap.config import WandbConfig, names
from vlmcap.config.sweep import OF_A_SWEEP
from vlmcap.errors import UserError

CURVES = {names.TRAIN_LOSS, names.VAL_LOSS, names.TOKENS_PER_S, *names.SCORES, *names.RATES, *names.COLLAPSE}
TOTALS = {
    *names.FINAL_SCORES,
    names.PEAK_MEMORY,
    names.SECONDS,
    names.FIT_SECONDS,
    names.PARAMETERS,
    names.TRAINED_PARAMETERS,
}


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    """The part of the workspace's definition that holds panels and runs."""
    from vlmcap.reporting.dashboard import spec, workspace

    content: dict[str, Any] = spec(workspace("captions", "team"))
    assert (content["project"], content["entity"]) == ("captions", "team")
    assert json.loads(json.dumps(content)) == content
    return content["spec"]["section"]  # type: ignore[no-any-return]


def panels(section: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in section["panelBankConfig"]["sections"]:
        for panel in one["panels"]:
            found.setdefault(panel["viewType"], []).append(panel["config"])
    return found


def test_the_sections(section: dict[str, Any]) -> None:
    titles = [one["name"] for one in section["panelBankConfig"]["sections"]]
    assert titles == [
        "val/cider by component",
        "Factors",
        "Score against cost",
        "Captions",
        "Learning curves",
        "Memory and throughput",
        "Collapse",
    ]


def test_runs_are_grouped_by_encoder_and_language_model(section: dict[str, Any]) -> None:
    (runs,) = section["runSets"]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("config", "encoder.value"),
        ("config", "llm.value"),
    ]
    (only,) = runs["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("jobType", "=", "train"), (
        "evaluations are not runs to compare"
    )
    by = {panel["groupBy"] for panel in panels(section)["Bar Chart"] if "groupBy" in panel}
    assert {"encoder.value", "llm.value"} <= by


def test_the_panels_ask_for_what_is_logged(section: dict[str, Any]) -> None:
    found = panels(section)
    logged = names.factors(compose([])).keys()
    (parallel,) = found["Parallel Coordinates Plot"]
    columns = [column["accessor"] for column in parallel["columns"]]
    factors = [
        column.removeprefix("config:").removesuffix(".value") for column in columns if column.startswith("config:")
    ]
    assert factors == ["encoder", "projector", "llm", "tuning", "hardware", "num_frames", "lora_rank", "seed"]
    assert set(factors) <= logged
    assert columns[-1] == "summary:val/cider"
    totals = {column.removeprefix("summary:") for column in columns if column.startswith("summary:")}
    for plot in found["Scatter Plot"]:
        assert plot["yAxis"] == "summary:val/cider"
        totals.add(plot["xAxis"].removeprefix("summary:"))
    assert names.PEAK_MEMORY in totals
    assert totals <= TOTALS
    curves = {name for plot in found["Run History Line Plot"] for name in plot["metrics"]}
    assert curves == CURVES
    assert {plot["xAxis"] for plot in found["Run History Line Plot"]} == {names.STEP}
    tables = [json.dumps(one) for one in found["Weave"]]
    assert [name in table for name, table in zip((names.VAL_TABLE, names.TEST_TABLE), tables, strict=True)] == [
        True,
        True,
    ]
    assert {name for bar in found["Bar Chart"] for name in bar["metrics"]} <= TOTALS | CURVES


def test_another_objective_is_what_is_compared() -> None:
    from vlmcap.reporting.dashboard import spec, workspace

    content = spec(workspace("captions", "team", "val/facts/mean"))
    plots = panels(content["spec"]["section"])["Scatter Plot"]
    assert {plot["yAxis"] for plot in plots} == {"summary:val/facts/mean"}


def test_without_a_network_the_command_writes_a_file_and_says_how_to_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(["dashboard", "--project", "captions"])
    assert capsys.readouterr().out == (
        "W&B cannot be reached, because WANDB_MODE=offline; dashboard.json holds the dashboard's definition; "
        "run `vlmcap dashboard --project captions` with an API key and a network to publish it.\n"
    )
    main(["dashboard", "--entity", "team", "--json", "made/one.json"])
    assert json.loads((tmp_path / "made" / "one.json").read_text(encoding="utf-8"))["entity"] == "team"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["dashboard.json", "one.json"]


def test_the_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vlmcap\[dashboard\]'"):
        command.show_dashboard("p", None, objective="val/cider", file=Path("x.json"))


SWEPT = [
    "encoder=clip,siglip2",
    "tuning.adapter_lr=tag(log,interval(1e-5,1e-3))",
    "seed=range(2)",
    "hardware=l4",
    "sweep=wandb",
]


def agent_commands(definition: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Returns the command of a run as W&B's agent builds it, with W&B's own code where it is accessible."""
    from wandb.sdk.launch.sweeps import utils

    made = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros = made | {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [definition["program"]]}
    words: list[str] = []
    for word in utils.create_sweep_command(list(definition["command"])):
        macro = re.fullmatch(r"\$\{(\w+)\}", word)
        words += macros[macro.group(1)] if macro else [word]
    return words


@pytest.mark.slow
def test_the_agents_command_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.sdk.launch.sweeps import utils

    file = tmp_path / "sweep.yaml"
    main(["dashboard", "--project", "captions", "--sweep", str(file), *SWEPT])
    assert "bayes search over encoder, tuning.adapter_lr, seed" in capsys.readouterr().out
    definition = utils.load_sweep_config(str(file))
    assert definition == yaml.safe_load(file.read_text(encoding="utf-8"))
    assert definition is not None
    assert (definition["method"], definition["run_cap"]) == ("bayes", 20)
    assert definition["metric"] == {"name": "val/facts/mean", "goal": "maximize"}  # the demo's
    assert definition["parameters"] == {
        "encoder": {"values": ["clip", "siglip2"]},
        "tuning.adapter_lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
        "seed": {"values": [0, 1]},
    }
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")  # as the agent does
    words = agent_commands(definition, {"encoder": "siglip2", "tuning.adapter_lr": 0.00021544, "seed": 1})
    assert words[:3] == ["/usr/bin/env", "python", "train.py"]
    config = compose(words[3:])
    assert (config.encoder.name, config.tuning.adapter_lr, config.seed, config.hardware.name) == (
        "siglip2",
        0.00021544,
        1,
        "l4",
    )
    assert not [word for word in words if word.startswith(OF_A_SWEEP)]  # a single run would refuse it
    assert isinstance(config.logger, WandbConfig)
    assert config.logger.project == "captions"
    assert config.paths.output_dir == "multirun/wandb/abc123"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["encoder=clip"], "no key has several values"),
        (["encoder=clip,siglp2"], "encoder=siglp2 does not exist; choose one of"),
        (["tuning.adapter_lr=interval(1e-5,1e-3)"], "sweep.method=grid cannot search a range"),
        (["seed=0,1", "sweep=wandb", "sweep.max_runs=0"], "sweep.max_runs must be at least 1"),
    ],
)
def test_a_mistake_is_said_before_a_sweep_is_made(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        sweep_definition(overrides, project="p", entity=None)


def test_overrides_without_a_sweep_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dashboard", "encoder=clip,siglip2"])
    assert "encoder=clip,siglip2 has no effect on `vlmcap dashboard`" in capsys.readouterr().err
