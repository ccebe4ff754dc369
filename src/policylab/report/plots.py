"""The learning curve of a report: one panel a metric, mean over seeds with its 95 % interval."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # a file is drawn; no screen is needed

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from policylab.report.groups import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
AXES = {"val/kl": "val/kl (nats a sequence)"}

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def draw_curves(groups: Sequence[Group], metrics: Sequence[str], title: str, path: Path) -> None:
    """Write a PNG that is readable at the width of a README (about 880 pixels).

    Args:
        groups: one line each; a group of one seed has no band.
        metrics: one panel each, from left to right; a metric without any value is a UserError.
        title: stands above the panels; may be empty.
        path: of the PNG.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(metrics), figsize=(4.6 * len(metrics), 3.4), squeeze=False, layout="constrained"
        )
        for axes, metric in zip(panels[0], metrics, strict=True):
            _draw_panel(axes, groups, metric)
        if len(groups) > 1:
            panels[0][0].legend(loc="best")
        if title:
            figure.suptitle("\n".join(textwrap.wrap(title, 44 * len(metrics))), fontsize=11)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_panel(axes: Axes, groups: Sequence[Group], metric: str) -> None:
    for index, group in enumerate(groups):
        colour = COLOURS[index % len(COLOURS)]
        curve = group.over_seeds(metric)
        iterations = list(curve)
        means = [point.mean for point in curve.values()]
        axes.plot(iterations, means, color=colour, label=group.label)
        low = [point.mean if point.low is None else point.low for point in curve.values()]
        high = [point.mean if point.high is None else point.high for point in curve.values()]
        axes.fill_between(iterations, low, high, color=colour, alpha=0.18, linewidth=0)
        if len(groups) == 1:
            for run in group.runs:  # the seeds themselves: an interval hides the one that went astray
                points = run.curve(metric)
                axes.plot(list(points), list(points.values()), color=colour, alpha=0.3, linewidth=0.8)
    axes.set_xlabel("iteration")
    axes.set_ylabel(AXES.get(metric, metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.margins(x=0.01)
