"""What a study keeps of its runs: a table for its README, and the figures of every run in a small file.

vlmcap report multirun/2026-11-28/05-54-30 --metric test/facts/mean --output report
python experiments/table.py report/leaderboard.csv --output experiments/projectors/runs.csv
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path

FACTS = ("place", "time", "weather", "object", "colour", "direction", "camera")
KEPT = (
    "seed",
    "test/facts/mean",
    "test/cider",
    "test/bleu_4",
    "test/meteor_ko",
    "val/facts/mean",
    "val/loss",
    "test/distinct_ratio",
    "seconds",
)
Row = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, best first, and writes the figures."""
    parser = argparse.ArgumentParser(description="Make a study's table of a report's leaderboard.csv.")
    parser.add_argument("leaderboard", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="figures of every run")
    chosen = parser.parse_args(arguments)
    with chosen.leaderboard.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "finished"]
    write_figures(rows, chosen.output)
    print("\n".join(table(rows)))


def write_figures(rows: Sequence[Row], path: Path) -> None:
    """A line a run: its configuration, seed and scores, the costs, no folder."""
    columns = (*KEPT, *(f"test/facts/{fact}" for fact in FACTS), "trained_parameters")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["configuration", *columns])
        for row in sorted(rows, key=lambda row: (_name(row), int(row["seed"]))):
            writer.writerow([_name(row), *(_short(row[column]) for column in columns)])


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: mean over seeds with its interval, each seed, the facts, and CIDEr."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (-float(row["group/score"]), int(row["seed"]))):
        groups.setdefault(_name(row), []).append(row)
    heads = [
        "configuration",
        "facts, mean",
        "95 %",
        "each seed",
        "to the best",
        "p (Holm)",
        *FACTS,
        "CIDEr",
        "loss",
        "distinct",
        "trained",
    ]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for name, runs in groups.items():
        first = runs[0]
        difference, p_value = first["group/difference"], first["group/p_holm"]
        cells = [
            name,
            f"**{float(first['group/score']):.3f}**",
            f"{float(first['group/low']):.3f} – {float(first['group/high']):.3f}",
            " ".join(f"{float(run['test/facts/mean']):.3f}" for run in runs),
            f"{float(difference):+.3f}" if difference else "best",
            ("< 0.001" if float(p_value) < 0.001 else f"{float(p_value):.3f}") if p_value else "",
            *(f"{_mean(runs, f'test/facts/{fact}'):.2f}" for fact in FACTS),
            f"{_mean(runs, 'test/cider'):.2f}",
            f"{_mean(runs, 'val/loss'):.3f}",
            f"{_mean(runs, 'test/distinct_ratio'):.2f}",
            f"{int(first['trained_parameters']):,}".replace(",", " "),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _name(row: Row) -> str:
    """Of the configuration, as the report has it for the run."""
    return re.sub(r",? ?seed \d+$", "", row["name"])


def _mean(runs: Sequence[Row], column: str) -> float:
    return sum(float(run[column]) for run in runs) / len(runs)


def _short(value: str) -> str:
    return f"{float(value):.4f}".rstrip("0").rstrip(".") if value else ""


if __name__ == "__main__":
    main()
