"""`vlmcap dashboard`: publishes the W&B workspace that compares runs, or writes the file of a W&B sweep."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep

from vlmcap.compose import compose, write_yaml
from vlmcap.config import Config, WandbConfig, WandbSweepConfig
from vlmcap.config.sweep import OF_A_SWEEP, SweepMethod
from vlmcap.config_saved import override_values
from vlmcap.errors import UserError, first_line
from vlmcap.files import write_json
from vlmcap.overrides import read_overrides, sweep_values
from vlmcap.sweep_syntax import override_parser

# The default run folder is named by the second, and two agents may start in the same one.
_FOLDER = "hydra.run.dir=multirun/wandb/${oc.env:WANDB_RUN_ID}"
OFFLINE_FILE = Path("dashboard.json")


def run(options: Namespace) -> None:
    """Publishes the dashboard, or writes the dashboard or a sweep to a file.

    Raises:
        UserError: An override is invalid, a package is missing, or W&B rejects the dashboard.
    """
    read = ("logger.project", "logger.entity", "monitor")
    given = {} if options.sweep else override_values(options.overrides, program="vlmcap dashboard", read=read)
    # The default of the configuration, which is a class attribute of the dataclass.
    project = options.project or given.get("logger.project") or WandbConfig.project
    entity = options.entity or given.get("logger.entity")
    if options.sweep:
        write_sweep(options.overrides, options.sweep, project=project, entity=entity)
    else:
        objective = options.objective or given.get("monitor") or Config.monitor
        show_dashboard(project, entity, objective=objective, file=options.json)


def show_dashboard(project: str, entity: str | None, *, objective: str, file: Path | None) -> None:
    """Publishes the dashboard; without a connection to W&B, or with `file`, writes its definition instead.

    Args:
        project: W&B project.
        entity: User or team that owns the project; None means the owner of the API key.
        objective: Metric that runs are compared by.
        file: JSON file of the definition; None publishes the dashboard.

    Raises:
        UserError: wandb-workspaces is not installed, or W&B rejects the dashboard.
    """
    if find_spec("wandb_workspaces") is None:
        raise UserError(
            "vlmcap dashboard needs the package wandb-workspaces, which is not installed: pip install "
            "'vlmcap[dashboard]'"
        )
    from vlmcap.reporting.dashboard import spec, workspace
    from vlmcap.training.loggers.wandb_run import offline_reason

    reason = None if file else offline_reason(is_asked=False)
    if file is None and reason is None:
        print(f"W&B: the dashboard is at {_publish(project, entity, objective)}")
        return
    target = file or OFFLINE_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    # A placeholder that the user replaces, as the owner is unknown without a connection.
    write_json(target, spec(workspace(project, entity or "ENTITY", objective)))
    why = "" if reason is None else f"W&B cannot be reached, {reason}; "
    command = _publish_command(project, entity, objective)
    print(
        f"{why}{target} holds the dashboard's definition; run `{command}` with an API key and a network to publish it."
    )


def _publish(project: str, entity: str | None, objective: str) -> str:
    import wandb

    from vlmcap.reporting.dashboard import workspace

    try:
        saved = workspace(project, entity or str(wandb.Api().default_entity), objective).save()
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(
            f"W&B rejected the dashboard of project {project}: {first_line(error)}; check --entity and --project"
        ) from error
    return str(saved.url)


def _publish_command(project: str, entity: str | None, objective: str) -> str:
    # Only what differs from the defaults, so that the printed command stays short.
    words = ["vlmcap", "dashboard", "--project", project]
    words += ["--entity", entity] if entity else []
    return shlex.join([*words, *(["--objective", objective] if objective != Config.monitor else [])])


def write_sweep(overrides: Sequence[str], file: Path, *, project: str, entity: str | None) -> None:
    """Writes the file of a W&B sweep and prints the command that starts it.

    Raises:
        UserError: An override is invalid, or nothing is swept.
    """
    content = sweep_definition(overrides, project=project, entity=entity)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_yaml(content, file)
    names = ", ".join(content["parameters"])
    print(
        f"{file}: {content['method']} search over {names}. `wandb sweep {file}` starts it and prints the command of an "
        "agent."
    )


def sweep_definition(overrides: Sequence[str], *, project: str, entity: str | None) -> dict[str, Any]:
    """Returns the sweep configuration of W&B: method, metric, parameters, and the command of a run.

    Args:
        overrides: Overrides as for `train.py -m`, including ranges such as `interval(1e-5,1e-3)` or
            `tag(log,interval(1e-5,1e-3))`.
        project: W&B project.
        entity: User or team that owns the project; None means the owner of the API key.

    Raises:
        UserError: An override cannot be parsed, a value does not compose, or nothing is swept.
    """
    parameters, fixed = _parsed(overrides)
    if not parameters:
        raise UserError("no key has several values; give one some, such as encoder=clip,siglip2")
    # Compose every value once, beside the first value of each other key: a typo is reported now, not by an agent.
    first = {key: _examples(space)[0] for key, space in parameters.items()}
    config = _composed(fixed, first)
    for key, space in parameters.items():
        for value in _examples(space)[1:]:
            _composed(fixed, first | {key: value})
    settings = (
        config.sweep
        if isinstance(config.sweep, WandbSweepConfig)
        # Another kind of sweep, such as the default grid, becomes a grid of W&B.
        else WandbSweepConfig("wandb", method=SweepMethod.grid, max_runs=None)
    )
    if settings.method is SweepMethod.grid and any("values" not in space for space in parameters.values()):
        raise UserError("sweep.method=grid cannot search a range; list its values, or set sweep=wandb")
    goal = "maximize" if config.monitor_mode == "max" else "minimize"
    # W&B reads the sweep's settings from this file; a run ignores them.
    read_by_runs = [override for override in fixed if not override.lstrip("+").startswith(OF_A_SWEEP)]
    command = [
        "${env}",
        # "${…}" are W&B's own variables; the agent replaces them.
        "${interpreter}",
        "${program}",
        "logger=wandb",
        f"logger.project={project}",
        _FOLDER,
        *read_by_runs,
        # "key=value", as Hydra reads it; W&B's default would be "--key=value".
        "${args_no_hyphens}",
    ]
    return {
        "name": " ".join(parameters),
        "program": "train.py",
        "project": project,
        **({"entity": entity} if entity else {}),
        "method": settings.method.value,
        # Without a cap, a grid ends by itself, and a search goes on until the agent is stopped.
        **({"run_cap": settings.max_runs} if settings.max_runs else {}),
        "metric": {"name": config.monitor, "goal": goal},
        "parameters": parameters,
        "command": command,
    }


def _composed(fixed: Sequence[str], values: dict[str, Any]) -> Config:
    return compose([*fixed, *(f"{key}={value}" for key, value in values.items())])


def _parsed(overrides: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the swept keys with their values in W&B's format, and the overrides of every run."""
    parameters: dict[str, dict[str, Any]] = {}
    fixed: list[str] = []
    with override_parser() as parser:
        for override in parser.parse_overrides(read_overrides(overrides, is_sweep=True)):
            space = override.value()
            if isinstance(space, IntervalSweep):
                # W&B's "log_uniform" takes exponents as its bounds, "log_uniform_values" takes the values.
                kind = "log_uniform_values" if "log" in space.tags else "uniform"
                parameters[override.get_key_element()] = {"distribution": kind, "min": space.start, "max": space.end}
            elif override.is_sweep_override():
                parameters[override.get_key_element()] = {"values": [_typed(value) for value in sweep_values(override)]}
            else:
                fixed.append(override.input_line or "")
    return parameters, fixed


def _examples(space: dict[str, Any]) -> list[Any]:
    """Returns all values of a list, or both ends of a range, to check that they compose."""
    return list(space["values"]) if "values" in space else [space["min"], space["max"]]


def _typed(value: str) -> int | float | str:
    """Converts a value to a number if it is one, so that W&B draws it on an axis."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
