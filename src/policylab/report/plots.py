"""Learning curves: mean over seeds with its 95 % interval, in one panel for each metric or for each group."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # draws to files, without a screen

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

from policylab.report.groups import Group
from policylab.report.read import ITERATION, TOKENS
from policylab.report.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#C8C8C8"
#: Panels in a row, if each group has its own.
COLUMNS = 4
AXES = {"val/kl": "val/kl (nats a sequence)", TOKENS: "tokens sampled in training"}

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


def draw_curves(
    groups: Sequence[Group],
    metrics: Sequence[str],
    x: str,
    title: str,
    path: Path,
    until: float | None = None,
) -> None:
    """Writes a PNG that is readable at the width of a README (about 880 pixels).

    Up to as many groups as there are colours share one panel for each metric. More groups get a panel each,
    of the first metric only, with the other groups in grey.

    Args:
        groups: a group of one seed has no band.
        metrics: panels from left to right; a metric without any value is a UserError.
        x: "iteration", a column that grows with it, or "val/kl".
        title: above the panels; may be empty.
        path: of the PNG.
        until: end of the x axis; None: shows everything.
    """
    with plt.rc_context(STYLE):
        draw = _one_panel_a_metric if len(groups) <= len(COLOURS) else _one_panel_a_group
        figure = draw(groups, metrics, x)
        if until is not None:
            for axes in figure.axes:
                axes.set_xlim(0, until)
        save(figure, title, path)


def save(figure: Figure, title: str, path: Path) -> None:
    """Writes the figure with its title above it, and closes it."""
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, int(9.5 * figure.get_figwidth()))), fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _one_panel_a_metric(groups: Sequence[Group], metrics: Sequence[str], x: str) -> Figure:
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(4.6 * len(metrics), 3.4), squeeze=False, layout="constrained"
    )
    for axes, metric in zip(panels[0], metrics, strict=True):
        for index, group in enumerate(groups):
            _draw(axes, group.over_seeds(metric, x), COLOURS[index], group.label)
        if len(groups) == 1:
            for run in groups[0].runs:  # each seed: an interval hides an outlier
                points = run.along(metric, x)
                axes.plot(list(points), list(points.values()), color=COLOURS[0], alpha=0.3, linewidth=0.8)
        axes.set_xlabel(AXES.get(x, x))
        axes.set_ylabel(AXES.get(metric, metric))
        _mark(axes, x)
    if len(groups) > 1:
        panels[0][0].legend(loc="best")
    return figure


def _one_panel_a_group(groups: Sequence[Group], metrics: Sequence[str], x: str) -> Figure:
    curves = [group.over_seeds(metrics[0], x) for group in groups]
    rows = math.ceil(len(groups) / COLUMNS)
    figure, panels = plt.subplots(
        rows, COLUMNS, figsize=(9.2, 1.9 * rows), sharex=True, sharey=True, layout="constrained"
    )
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, group, own in zip(panels.flat, groups, curves, strict=False):
        for other in curves:
            axes.plot(list(other), [point.mean for point in other.values()], color=GREY, linewidth=0.7)
        _draw(axes, own, COLOURS[0], group.label)
        axes.set_title(group.label, fontsize=10)
        _mark(axes, x)
    figure.supxlabel(AXES.get(x, x), fontsize=10)
    figure.supylabel(AXES.get(metrics[0], metrics[0]), fontsize=10)
    return figure


def _draw(axes: Axes, curve: Mapping[float, Estimate], colour: str, label: str) -> None:
    places = list(curve)
    axes.plot(places, [point.mean for point in curve.values()], color=colour, label=label)
    low = [point.mean if point.low is None else point.low for point in curve.values()]
    high = [point.mean if point.high is None else point.high for point in curve.values()]
    axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def _mark(axes: Axes, x: str) -> None:
    if x == ITERATION:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
