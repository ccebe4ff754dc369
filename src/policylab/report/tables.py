"""The numbers of a report: Markdown tables, and a tidy CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from policylab.report.groups import Group
from policylab.report.read import ITERATION, KL
from policylab.report.statistics import Estimate, estimate, holm, iqm_interval, p_above_zero

ENTROPY = "train/entropy"
HEADER = (
    "run", "seeds", "before", "after", "IQM [95 % bootstrap]", "gain [95 % t]", "p", "KL", "seconds", "tokens sampled",
)  # fmt: skip


def markdown_table(groups: Sequence[Group], metric: str) -> str:
    """One row for each group: a metric before and after training, its gain, KL, seconds and tokens.

    ``IQM`` is the interquartile mean of ``after``; ``gain`` is the mean over seeds of after minus before; ``p`` is the
    p-value of the gain (`p_above_zero`), corrected for the number of groups.
    """
    p_values = holm([p_above_zero(group.gains(metric)) for group in groups])
    body = [_row(group, metric, p) for group, p in zip(groups, p_values, strict=True)]
    rows = [HEADER, _rule(HEADER), *body]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{_legend(groups, metric)}\n"


def kl_table(groups: Sequence[Group], metric: str, at_kl: Sequence[float]) -> str:
    """One row for each group: a metric at given KLs to the reference, mean over seeds with its 95 % interval."""
    header = ("run", "seeds", *(f"at {nats:g} nats" for nats in at_kl))
    body = [
        (group.label, str(len(group.runs)), *(_at_kl(group.at_kl(metric, n), len(group.runs)) for n in at_kl))
        for group in groups
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, _rule(header), *body])
    legend = (
        f"{metric} when a run first reaches this KL to the reference (nats a sequence), linear between validations: "
        "mean over seeds with Student's t interval. A dash: not all seeds reach it, or they start beyond it."
    )
    return f"{table}\n\n{legend}\n"


def _at_kl(found: Sequence[float], seeds: int) -> str:
    if len(found) < seeds:
        return f"- ({len(found)} of {seeds})"
    value = estimate(found)
    return _with_interval(value.mean, _bounds(value), ".3f")


def _rule(header: Sequence[str]) -> tuple[str, ...]:
    """The line below a header: text is left-aligned, numbers are right-aligned."""
    return ("---", *["---:"] * (len(header) - 1))


def _row(group: Group, metric: str, p: float | None) -> tuple[str, ...]:
    after = estimate(group.ends(metric))
    gain = estimate(group.gains(metric))
    return (
        group.label,
        str(len(group.runs)),
        f"{after.mean - gain.mean:z.3f}",
        f"{after.mean:.3f}",
        _with_interval(after.iqm, iqm_interval(group.ends(metric)), "z.3f"),
        _with_interval(gain.mean, _bounds(gain), "+.3f"),
        _p_value(p),
        _mean_of([list(run.curves[KL].values())[-1] for run in group.runs if run.curves.get(KL)], "z.1f"),
        _cost(group, "wall_seconds"),
        _cost(group, "tokens_sampled"),
    )


def _bounds(value: Estimate) -> tuple[float, float] | None:
    return None if value.low is None or value.high is None else (value.low, value.high)


def _with_interval(value: float, bounds: tuple[float, float] | None, form: str) -> str:
    interval = "one seed" if bounds is None else f"{bounds[0]:{form}}, {bounds[1]:{form}}"
    return f"{value:{form}} [{interval}]"


def _p_value(p: float | None) -> str:
    if p is None:
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def _cost(group: Group, key: str) -> str:
    return _mean_of([run.summary[key] for run in group.runs if key in run.summary], ",.0f")


def _mean_of(values: Sequence[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else "-"


def _legend(groups: Sequence[Group], metric: str) -> str:
    lines = [
        f"{metric}, KL in nats a sequence, wall seconds of a run and tokens sampled in training: means over seeds. "
        "IQM: mean of the middle half of the seeds after training, with percentiles over bootstrap resamples of the "
        "seeds (with few seeds they cover the truth less often than 95 %). Gain: after minus before, with Student's "
        "t interval of the mean. "
        "p: one-sided t-test that the gain is above 0"
        + (f", Holm-corrected for {len(groups)} comparisons." if len(groups) > 1 else ".")
    ]
    for group in groups:
        for run in group.runs:
            if run.status != "done":
                last = max(run.curve(metric))
                lines.append(f"Seed {run.seed} of {group.label} is {run.status} after iteration {last}.")
    return "\n".join(lines)


def write_metrics(groups: Sequence[Group], metrics: Sequence[str], x: str, path: Path) -> None:
    """Writes a tidy CSV: a line for each run and iteration with any of the metrics; a missing value is an empty cell.

    Adds the ``train/...`` of each ``val/...``, and the policy's entropy, if the runs have them. The x axis is the
    first column.
    """
    runs = [(group.label, run) for group in groups for run in group.runs]
    trained = [name.replace("val/", "train/", 1) for name in metrics if name.startswith("val/")]
    wanted = list(dict.fromkeys([*metrics, *trained, ENTROPY]))
    columns = [name for name in wanted if any(run.curves.get(name) for _, run in runs)]
    axis = [] if x == ITERATION else [x]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "seed", "iteration", *axis, *columns])
        for label, run in runs:
            curves = [run.curves.get(name, {}) for name in columns]
            for iteration in sorted(set().union(*curves)):
                place = [f"{run.curves[name].get(iteration, 0):.0f}" for name in axis]
                cells = [f"{curve[iteration]:.6g}" if iteration in curve else "" for curve in curves]
                writer.writerow([label, run.seed, iteration, *place, *cells])
