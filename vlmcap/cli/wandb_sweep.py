"""A sweep's overrides as the YAML file that `wandb sweep` takes; its agents then start `train.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmcap.compose import compose, config_dir, explain, innermost, register_schemas, write_yaml
from vlmcap.config.sweep import SweepMethod
from vlmcap.errors import UserError

# Two agents may start in the same second, and a run's usual folder is named by it.
_FOLDER = "hydra.run.dir=multirun/wandb/${oc.env:WANDB_RUN_ID}"


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
            compose([*fixed, *(f"{other}={_examples(found)[0]}" for other, found in parameters.items() if other != key), f"{key}={value}"])
    settings = config.sweep.wandb
    if settings.method is SweepMethod.grid and any("values" not in space for space in parameters.values()):
        raise UserError("a range has no end for sweep.wandb.method=grid; give values one by one, or set sweep=wandb")
    goal = "maximize" if config.objective_mode == "max" else "minimize"
    command = ["${env}", "${interpreter}", "${program}", "logger=wandb", f"logger.project={project}", _FOLDER, *fixed, "${args_no_hyphens}"]
    return {
        "name": " ".join(parameters),
        "program": "train.py",
        "project": project,
        **({"entity": entity} if entity else {}),
        "method": settings.method.value,
        **({"run_cap": settings.max_runs} if settings.max_runs else {}),
        "metric": {"name": config.objective, "goal": goal},
        "parameters": parameters,
        "command": command,
    }


def _parsed(overrides: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Swept keys with their values in W&B's words, and the overrides that stand for all runs."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep
    from hydra.errors import HydraException

    register_schemas()
    parameters: dict[str, dict[str, Any]] = {}
    fixed: list[str] = []
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # glob() asks it for the names
            for override in parser.parse_overrides([*overrides]):
                space = override.value()
                if isinstance(space, IntervalSweep):
                    kind = "log_uniform_values" if "log" in space.tags else "uniform"
                    parameters[override.get_key_element()] = {"distribution": kind, "min": space.start, "max": space.end}
                elif override.is_sweep_override():
                    parameters[override.get_key_element()] = {"values": [_typed(value) for value in override.sweep_string_iterator()]}
                else:
                    fixed.append(override.input_line or "")
    except HydraException as error:
        raise UserError(explain(innermost(error))) from error
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
