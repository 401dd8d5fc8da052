"""Builds the W&B workspace that compares runs.

Nothing here uses the network. Panels read the names in `vlmcap.config.names`, which runs log.
"""

from __future__ import annotations

import json
from typing import Any

from vlmcap.config import Config, names

PARALLEL = ("encoder", "projector", "llm", "tuning", "hardware", "num_frames", "lora_rank", "seed")
"""Factors shown in the parallel coordinates plot, before memory and score."""


def sections(objective: str = Config.monitor) -> dict[str, list[Any]]:
    """Returns the panels of each section by its title.

    Args:
        objective: Metric that runs are compared by.
    """
    return {
        f"{objective} by component": _score_panels(objective),
        "Factors": _factor_panels(objective),
        "Score against cost": _cost_panels(objective),
        "Captions": _caption_panels(),
        "Learning curves": _curves(
            {"loss": (names.TRAIN_LOSS, names.VAL_LOSS), "scores": names.SCORES, "learning rates": names.RATES}
        ),
        "Memory and throughput": _speed_panels(),
        "Collapse": _curves({name.removeprefix("val/").replace("_", " "): (name,) for name in names.COLLAPSE}),
    }


def workspace(project: str, entity: str, objective: str = Config.monitor) -> Any:
    """Builds the workspace, which groups runs by encoder and language model; `.save()` publishes it.

    Args:
        project: W&B project.
        entity: User or team that owns the project.
        objective: Metric that runs are compared by.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    ws_sections = [
        ws.Section(
            # The first four sections are what a comparison looks at.
            name=title,
            panels=panels,
            is_open=index < 4,
            layout_settings=ws.SectionLayoutSettings(columns=2, rows=2),
        )
        for index, (title, panels) in enumerate(sections(objective).items())
    ]
    shown = [f"config:{name}" for name in ("encoder", "projector", "llm", "tuning", "hardware")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="vlmcap: comparison of runs",
        sections=ws_sections,
        settings=ws.WorkspaceSettings(x_axis=names.STEP, max_runs=50),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("JobType") == "train"),
            groupby=[expr.Config("encoder"), expr.Config("llm")],
            order=[expr.Ordering(expr.Summary(objective), ascending=False)],
            pinned_columns=[*shown, f"summary:{objective}", f"summary:{names.PEAK_MEMORY}", f"summary:{names.SECONDS}"],
        ),
    )


def spec(workspace: Any) -> dict[str, Any]:
    """Returns the JSON that W&B stores for a workspace."""
    content: dict[str, Any] = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return content


def _score_panels(objective: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.BarPlot(
            title=f"{objective} by {factor}: mean and standard error",
            metrics=[wr.Metric(objective)],
            groupby=wr.Config(factor),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
        )
        for factor in ("encoder", "llm", "projector", "tuning")
    ]


def _factor_panels(objective: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    values = [names.PEAK_MEMORY, names.SECONDS, "val/bleu_4", objective]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(name), display_name=name) for name in PARALLEL]
    columns += [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name), display_name=name) for name in dict.fromkeys(values)
    ]
    return [
        wr.ParallelCoordinatesPlot(title="Factors, costs and score", columns=columns),
        wr.ParameterImportancePlot(with_respect_to=objective),
        wr.RunComparer(diff_only="split"),
    ]


def _cost_panels(objective: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    costs = {
        names.PEAK_MEMORY: "peak memory (GiB)",
        names.SECONDS: "seconds",
        names.TRAINED_PARAMETERS: "trained parameters",
    }
    return [
        wr.ScatterPlot(
            title=f"{objective} against {label}",
            x=wr.SummaryMetric(name),
            y=wr.SummaryMetric(objective),
            # Numbers of trained parameters differ by orders of magnitude.
            log_x=name == names.TRAINED_PARAMETERS,
            legend_template="${config:encoder} ${config:llm} ${config:projector}",
        )
        for name, label in costs.items()
    ]


def _caption_panels() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [wr.WeavePanelSummaryTable(table_name=name) for name in (names.VAL_TABLE, names.TEST_TABLE)]


def _speed_panels() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    bars = {
        names.PEAK_MEMORY: "Peak memory (GiB)",
        names.FIT_SECONDS: "Seconds of training",
        names.PARAMETERS: "Parameters",
    }
    return [
        *_curves({"tokens per second": (names.TOKENS_PER_S,)}),
        *(wr.BarPlot(title=label, metrics=[wr.Metric(name)]) for name, label in bars.items()),
    ]


def _curves(titled: dict[str, tuple[str, ...]]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(title=title, x=wr.Metric(names.STEP), y=[wr.Metric(name) for name in curves])
        for title, curves in titled.items()
    ]
