"""A figure that compares many groups of runs: final values, the best gain on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from policylab.report.groups import Group
from policylab.report.plots import AXES, COLOURS, GREY, STYLE, save
from policylab.report.statistics import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def by_gain(groups: Sequence[Group], metric: str) -> list[Group]:
    """The groups, the largest mean gain first."""
    return sorted(groups, key=lambda group: float(np.mean(group.gains(metric))), reverse=True)


def draw_ranking(groups: Sequence[Group], metrics: Sequence[str], title: str, path: Path) -> None:
    """Writes a PNG with a row for each group and a panel for each metric.

    A grey dot is the last value of a seed, the bar their mean with its 95 % interval; the dashed line is the mean
    of the first metric before training.

    Args:
        groups: at least one; sorted here, by the gain in the first metric.
        metrics: panels from left to right.
        title: above the panels; may be empty.
        path: of the PNG.
    """
    ranked = by_gain(groups, metrics[0])
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1,
            len(metrics),
            figsize=(1.2 + 3.6 * len(metrics), 1.2 + 0.28 * len(ranked)),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, metric in zip(panels[0], metrics, strict=True):
            _draw_panel(axes, ranked, metric)
        starts = [next(iter(run.curve(metrics[0]).values())) for group in ranked for run in group.runs]
        panels[0][0].axvline(float(np.mean(starts)), color="black", linestyle="--", linewidth=0.8)
        panels[0][0].set_yticks(range(len(ranked)), [group.label for group in ranked])
        panels[0][0].invert_yaxis()
        save(figure, title, path)


def _draw_panel(axes: Axes, groups: Sequence[Group], metric: str) -> None:
    for row, group in enumerate(groups):
        ends = group.ends(metric)
        axes.plot(ends, [row + 0.22] * len(ends), "o", color=GREY, markersize=3)
        mean = estimate(ends)
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [row, row], color=COLOURS[0], linewidth=2)
        axes.plot(mean.mean, row, "o", color=COLOURS[0], markersize=5)
    axes.set_xlabel(AXES.get(metric, metric))
    axes.grid(visible=False, axis="y")
