"""Curves of a run, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from policylab.report.html import Html, tag
from policylab.runs.figures import number

Curves = Mapping[str, Mapping[int, float]]
#: Title, unit, and the columns of ``metrics.csv``, which may have a ``*``.
CHARTS = (
    ("Reward", "", ("train/reward", "val/reward")),
    ("Parts of the reward", "", ("train/reward/*",)),
    ("KL to the reference", "nats a sequence", ("train/kl", "val/kl")),
    ("Entropy", "nats a token", ("train/entropy",)),
    ("Length", "tokens", ("train/length", "val/length")),
    ("Completions that end", "share", ("train/ended", "val/ended")),
    ("Clipped", "share of tokens", ("train/clip_fraction",)),
    ("Value fit", "explained variance", ("train/explained_variance",)),
    ("Gradient norm", "", ("train/grad_norm", "train/critic_grad_norm")),
    ("Loss", "", ("train/loss", "val/loss")),
    ("Time of an iteration", "seconds", ("perf/[!i]*[!r]_s",)),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 10, 10, 24
#: A longer curve is drawn by the lowest and the highest value of each of so many spans.
SPANS = 300


@dataclass(frozen=True)
class Chart:
    """One panel: some columns by iteration, without values that are not finite."""

    title: str
    unit: str
    curves: Curves
    missing: int  #: number of values that are not finite

    def data(self) -> dict[str, Any]:
        """What the page's script needs to show values under the pointer."""
        return {
            "box": [LEFT, WIDTH - RIGHT, *span(self.curves)],
            "curves": [[label(name), [*thinned(curve).items()]] for name, curve in self.curves.items()],
        }


def charts(curves: Curves) -> tuple[list[Chart], list[Chart]]:
    """The charts of `CHARTS` that a run has, and one for each other metric."""
    drawn, left = list[Chart](), dict(curves)
    for title, unit, patterns in CHARTS:
        names = [name for pattern in patterns for name in curves if fnmatchcase(name, pattern)]
        left = {name: curve for name, curve in left.items() if name not in names}
        drawn.append(chart(title, unit, {name: curves[name] for name in names}))
    titles = dict.fromkeys(name.removeprefix("train/").removeprefix("val/") for name in left)
    other = [
        chart(
            title,
            "",
            {name: left[name] for name in (title, f"train/{title}", f"val/{title}") if name in left},
        )
        for title in titles
    ]
    return [found for found in drawn if found.curves], [found for found in other if found.curves]


def chart(title: str, unit: str, curves: Curves) -> Chart:
    """A chart of the finite values."""
    finite = {n: {i: y for i, y in sorted(curve.items()) if math.isfinite(y)} for n, curve in curves.items()}
    missing = sum(len(curves[name]) - len(finite[name]) for name in curves)
    return Chart(title, unit, {name: curve for name, curve in finite.items() if curve}, missing)


def figure(chart: Chart, index: int) -> Html:
    """The chart with its legend.

    Args:
        index: its place in the data of the page's script.
    """
    legend = [
        tag("span", tag("i", class_=f"key c{i % 8}"), label(name), " ", tag("output", number(last(curve))))
        for i, (name, curve) in enumerate(chart.curves.items())
    ]
    heading = [chart.title, tag("small", f" {chart.unit}")]
    notes = [tag("p", f"{chart.missing} values are not finite", class_="bad")] if chart.missing else []
    legend = [tag("output", class_="at"), *legend]
    return tag(
        "figure", tag("figcaption", *heading), svg(chart, index), tag("p", *legend, class_="legend"), *notes
    )


def svg(chart: Chart, index: int) -> Html:
    """The axes and the lines."""
    values = [y for curve in chart.curves.values() for y in curve.values()]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    first, end = span(chart.curves)

    def x(iteration: float) -> float:
        return round(LEFT + (iteration - first) / (end - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = list[Html]()
    for tick in ticks(low, high, 4):
        parts.append(line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "zero" if tick == 0 else "grid"))
        parts.append(tag("text", short(tick), x=LEFT - 6, y=y(tick) + 3.5, text_anchor="end"))
    for tick in ticks(first, end, 5):
        if tick == int(tick):
            parts.append(tag("text", short(tick), x=x(tick), y=HEIGHT - 8, text_anchor="middle"))
    for i, curve in enumerate(chart.curves.values()):
        points = [(x(iteration), y(value)) for iteration, value in thinned(curve).items()]
        if len(points) > 1:
            drawn = " ".join(f"{across},{down}" for across, down in points)
            parts.append(tag("polyline", points=drawn, class_=f"c{i % 8}"))
        if len(points) <= 16:
            parts += [tag("circle", cx=across, cy=down, r=2.5, class_=f"c{i % 8}") for across, down in points]
    parts.append(line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "cursor"))
    spoken = "; ".join(
        f"{name} from {number(next(iter(curve.values())))} to {number(last(curve))}"
        for name, curve in chart.curves.items()
    )
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        tabindex=0,
        data_chart=index,
        aria_label=f"{chart.title}: {spoken}",
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def span(curves: Curves) -> tuple[int, int]:
    """The first and the last iteration."""
    iterations = [iteration for curve in curves.values() for iteration in curve]
    return min(iterations), max(max(iterations), min(iterations) + 1)


def thinned(curve: Mapping[int, float]) -> dict[int, float]:
    """A curve of at most two values for each of `SPANS` spans: the lowest and the highest, so that spikes stay."""
    points = list(curve.items())
    if len(points) <= 2 * SPANS:
        return dict(points)
    edges = [round(i * len(points) / SPANS) for i in range(SPANS + 1)]
    kept = set[tuple[int, float]]()
    for start, end in pairwise(edges):
        part = points[start:end]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return dict(sorted(kept))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in a range, about ``count``.

    >>> ticks(0.13, 0.72, 4), ticks(0, 30, 5)
    ([0.2, 0.4, 0.6], [0.0, 10.0, 20.0, 30.0])
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number on an axis.

    >>> short(20000), short(0.25), short(1e-5), short(-3)
    ('20k', '0.25', '1e-05', '-3')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def label(name: str) -> str:
    """The name of a curve: ``train`` and ``val``, or what sets it apart.

    >>> label("train/reward"), label("train/reward/positive"), label("perf/update_s")
    ('train', 'positive', 'update')
    """
    group, _, rest = name.partition("/")
    if group == "perf":
        return rest.removesuffix("_s")
    return {"train/critic_grad_norm": "critic"}.get(name) or (
        rest.rpartition("/")[2] if "/" in rest else group
    )


def last(curve: Mapping[int, float]) -> float:
    """The last value."""
    return next(reversed(list(curve.values())))
