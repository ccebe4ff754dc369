"""The numbers of a report: a Markdown table for people, a tidy CSV for programs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from policylab.report.groups import Group
from policylab.report.statistics import Estimate, estimate

KL = "val/kl"


def markdown_table(groups: Sequence[Group], metric: str) -> str:
    """One row a group: before, after and gain of a metric, and what they cost.

    ``gain`` is the mean over seeds of after minus before, with its 95 % interval (Student's t over seeds);
    ``IQM`` is the interquartile mean of ``after``.
    """
    header = ("run", "seeds", "before", "after", "IQM", "gain [95 %]", "KL", "seconds", "tokens sampled")
    rows = [header, ("---", *["---:"] * (len(header) - 1)), *(_row(group, metric) for group in groups)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{_legend(groups, metric)}\n"


def _row(group: Group, metric: str) -> tuple[str, ...]:
    curves = [list(run.curve(metric).values()) for run in group.runs]
    after = estimate([curve[-1] for curve in curves])
    return (
        group.label,
        str(len(group.runs)),
        f"{estimate([curve[0] for curve in curves]).mean:.3f}",
        f"{after.mean:.3f}",
        f"{after.iqm:.3f}",
        _with_interval(estimate([curve[-1] - curve[0] for curve in curves])),
        _mean_of([list(run.curves[KL].values())[-1] for run in group.runs if run.curves.get(KL)], "z.1f"),
        _cost(group, "wall_seconds"),
        _cost(group, "tokens_sampled"),
    )


def _with_interval(gain: Estimate) -> str:
    interval = "one seed" if gain.low is None or gain.high is None else f"{gain.low:+.3f}, {gain.high:+.3f}"
    return f"{gain.mean:+.3f} [{interval}]"


def _cost(group: Group, key: str) -> str:
    return _mean_of([run.summary[key] for run in group.runs if key in run.summary], ",.0f")


def _mean_of(values: Sequence[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else "-"


def _legend(groups: Sequence[Group], metric: str) -> str:
    lines = [f"{metric}, KL in nats a sequence, seconds and tokens: means over seeds; interval: Student's t."]
    for group in groups:
        for run in group.runs:
            if run.status != "done":
                last = max(run.curve(metric))
                lines.append(f"Seed {run.seed} of {group.label} is {run.status} after iteration {last}.")
    return "\n".join(lines)


def write_metrics(groups: Sequence[Group], metrics: Sequence[str], path: Path) -> None:
    """A tidy CSV: one line for each run and iteration that has any of the metrics; no value, empty cell.

    Beside each ``val/...`` stands its ``train/...``, where the runs have it.
    """
    runs = [(group.label, run) for group in groups for run in group.runs]
    wanted = [*metrics, *(name.replace("val/", "train/", 1) for name in metrics if name.startswith("val/"))]
    columns = [name for name in wanted if any(run.curves.get(name) for _, run in runs)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "seed", "iteration", *columns])
        for label, run in runs:
            curves = [run.curves.get(name, {}) for name in columns]
            for iteration in sorted(set().union(*curves)):
                cells = [f"{curve[iteration]:.6g}" if iteration in curve else "" for curve in curves]
                writer.writerow([label, run.seed, iteration, *cells])
