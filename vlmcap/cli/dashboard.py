"""`vlmcap dashboard`: the W&B workspace that compares runs, and the file of a W&B sweep."""

from __future__ import annotations

import json
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
from vlmcap.files import replacing
from vlmcap.overrides import read_overrides, sweep_values
from vlmcap.sweep_syntax import override_parser

# Two agents may start in the same second, and a run's usual folder is named by it.
_FOLDER = "hydra.run.dir=multirun/wandb/${oc.env:WANDB_RUN_ID}"
OFFLINE_FILE = Path("dashboard.json")


def run(options: Namespace) -> None:
    """Publishes the dashboard, or writes it or a sweep to a file.

    Raises:
        UserError: An override is wrong, a package is missing, or W&B refuses.
    """
    read = ("logger.project", "logger.entity", "monitor")
    given = {} if options.sweep else override_values(options.overrides, program="vlmcap dashboard", read=read)
    project = options.project or given.get("logger.project") or WandbConfig.project
    entity = options.entity or given.get("logger.entity")
    if options.sweep:
        write_sweep(options.overrides, options.sweep, project=project, entity=entity)
    else:
        objective = options.objective or given.get("monitor") or Config.monitor
        show_dashboard(project, entity, objective=objective, file=options.json)


def show_dashboard(project: str, entity: str | None, *, objective: str, file: Path | None) -> None:
    """Publishes the dashboard where W&B can be reached, and otherwise, or if a file is named, writes what it would publish.

    Args:
        project: Of W&B.
        entity: User or team; None is that of the key.
        objective: The score that runs are compared by.
        file: Where the JSON goes; None publishes.

    Raises:
        UserError: wandb-workspaces is not installed, or W&B refuses.
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
    with replacing(target) as partial:
        partial.write_text(
            json.dumps(spec(workspace(project, entity or "ENTITY", objective)), indent=1) + "\n", encoding="utf-8"
        )
    why = "" if reason is None else f"W&B cannot be asked, {reason}; "
    again = _command(project, entity, objective)
    print(f"{why}{target} holds the dashboard's definition, and `{again}` with a key and a network publishes it.")


def _publish(project: str, entity: str | None, objective: str) -> str:
    import wandb

    from vlmcap.reporting.dashboard import workspace

    try:
        made = workspace(project, entity or str(wandb.Api().default_entity), objective).save()
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(
            f"W&B refused the dashboard of project {project}: {first_line(error)}; check --entity and --project"
        ) from error
    return str(made.url)


def _command(project: str, entity: str | None, objective: str) -> str:
    words = ["vlmcap", "dashboard", "--project", project]
    words += ["--entity", entity] if entity else []
    return shlex.join([*words, *(["--objective", objective] if objective != Config.monitor else [])])


def write_sweep(overrides: Sequence[str], file: Path, *, project: str, entity: str | None) -> None:
    """Writes the file and says how to go on.

    Raises:
        UserError: An override is wrong, or nothing is swept.
    """
    content = sweep_definition(overrides, project=project, entity=entity)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_yaml(content, file)
    names = ", ".join(content["parameters"])
    print(f"{file}: {content['method']} over {names}. `wandb sweep {file}` begins it and prints the agent's command.")


def sweep_definition(overrides: Sequence[str], *, project: str, entity: str | None) -> dict[str, Any]:
    """What `wandb sweep` takes: method, metric, parameters, and the command of a run.

    Args:
        overrides: As after `train.py -m`; a range such as `interval(1e-5,1e-3)` or `tag(log,interval(1e-5,1e-3))` too.
        project: Of W&B.
        entity: User or team that has it; None is that of the key.

    Raises:
        UserError: An override cannot be read, a value does not compose, or nothing is swept.
    """
    parameters, fixed = _parsed(overrides)
    if not parameters:
        raise UserError("nothing is swept; give a key several values, such as encoder=clip,siglip2")
    config = compose([*fixed, *(f"{key}={_examples(space)[0]}" for key, space in parameters.items())])
    for key, space in parameters.items():  # each value at least once: a typo is said now, not on an agent
        for value in _examples(space)[1:]:
            compose(
                [
                    *fixed,
                    *(f"{other}={_examples(found)[0]}" for other, found in parameters.items() if other != key),
                    f"{key}={value}",
                ]
            )
    settings = (
        config.sweep
        if isinstance(config.sweep, WandbSweepConfig)
        else WandbSweepConfig("wandb", method=SweepMethod.grid, max_runs=None)
    )
    if settings.method is SweepMethod.grid and any("values" not in space for space in parameters.values()):
        raise UserError("a range has no end for sweep.method=grid; give values one by one, or set sweep=wandb")
    goal = "maximize" if config.monitor_mode == "max" else "minimize"
    # A run reads nothing of the sweep, which W&B has from this file.
    own = [override for override in fixed if not override.lstrip("+").startswith(OF_A_SWEEP)]
    command = [
        "${env}",
        "${interpreter}",
        "${program}",
        "logger=wandb",
        f"logger.project={project}",
        _FOLDER,
        *own,
        "${args_no_hyphens}",
    ]
    return {
        "name": " ".join(parameters),
        "program": "train.py",
        "project": project,
        **({"entity": entity} if entity else {}),
        "method": settings.method.value,
        **({"run_cap": settings.max_runs} if settings.max_runs else {}),
        "metric": {"name": config.monitor, "goal": goal},
        "parameters": parameters,
        "command": command,
    }


def _parsed(overrides: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Swept keys with their values in W&B's words, and the overrides that stand for all runs."""
    parameters: dict[str, dict[str, Any]] = {}
    fixed: list[str] = []
    with override_parser() as parser:
        for override in parser.parse_overrides(read_overrides(overrides, is_sweep=True)):
            space = override.value()
            if isinstance(space, IntervalSweep):
                kind = "log_uniform_values" if "log" in space.tags else "uniform"
                parameters[override.get_key_element()] = {"distribution": kind, "min": space.start, "max": space.end}
            elif override.is_sweep_override():
                parameters[override.get_key_element()] = {"values": [_typed(value) for value in sweep_values(override)]}
            else:
                fixed.append(override.input_line or "")
    return parameters, fixed


def _examples(space: dict[str, Any]) -> list[Any]:
    """Values that show whether a space composes: all, or the ends of a range."""
    return list(space["values"]) if "values" in space else [space["min"], space["max"]]


def _typed(value: str) -> int | float | str:
    """A number where it reads as one, so that W&B draws it on an axis."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
