"""`vlmcap dashboard`: the W&B workspace that compares runs, and the file of a W&B sweep."""

from __future__ import annotations

import argparse
import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmcap.errors import UserError, first_line
from vlmcap.files import replacing


def add(commands: Any) -> None:
    """Adds the command to the parsers of argparse."""
    text = "the Weights & Biases dashboard that compares runs, and sweeps for W&B's agents"
    parser = commands.add_parser("dashboard", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with --sweep: as of train.py -m, such as encoder=clip,siglip2")
    parser.add_argument("--project", default="vlmcap", metavar="P", help="W&B project, as logger.project (default: vlmcap)")
    parser.add_argument("--entity", metavar="E", help="user or team that has the project (default: that of the key)")
    parser.add_argument("--objective", default="val/cider", metavar="NAME", help="score to compare by (default: val/cider)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the definition to a file and publish nothing")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="write a sweep of the overrides for `wandb sweep` to a file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.sweep:
        from vlmcap.cli.wandb_sweep import write_sweep

        write_sweep(options.overrides, options.sweep, project=options.project, entity=options.entity)
        return
    if options.overrides:
        raise UserError(f"{options.overrides[0]} is of a sweep; add --sweep FILE, or leave it out")

    show_dashboard(options.project, options.entity, objective=options.objective, file=options.json)


OFFLINE_FILE = Path("dashboard.json")


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
        raise UserError("vlmcap dashboard needs the package wandb-workspaces, which is not installed: pip install 'vlmcap[dashboard]'")
    from vlmcap.reporting.dashboard import spec, workspace
    from vlmcap.training.loggers.wandb_run import offline_reason

    reason = None if file else offline_reason(is_asked=False)
    if file is None and reason is None:
        print(f"W&B: the dashboard is at {_publish(project, entity, objective)}")
        return
    target = file or OFFLINE_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_text(json.dumps(spec(workspace(project, entity or "ENTITY", objective)), indent=1) + "\n", encoding="utf-8")
    why = "" if reason is None else f"W&B cannot be asked, {reason}; "
    again = _command(project, entity, objective)
    print(f"{why}{target} holds the dashboard's definition, and `{again}` with a key and a network publishes it.")


def _publish(project: str, entity: str | None, objective: str) -> str:
    import wandb

    from vlmcap.reporting.dashboard import workspace

    try:
        made = workspace(project, entity or str(wandb.Api().default_entity), objective).save()
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"W&B refused the dashboard of project {project}: {first_line(error)}; check --entity and --project") from error
    return str(made.url)


def _command(project: str, entity: str | None, objective: str) -> str:
    words = ["vlmcap", "dashboard", "--project", project]
    words += ["--entity", entity] if entity else []
    return shlex.join([*words, *(["--objective", objective] if objective != "val/cider" else [])])
