"""`vlmcap dashboard`: the comparing dashboard onto W&B's server, or into a file."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

from vlmcap.errors import UserError, first_line
from vlmcap.files import replacing

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
