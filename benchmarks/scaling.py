"""How the cost of an iteration grows with the batch, the completions' length, the group and the model.

    python benchmarks/scaling.py --out benchmarks/results/scaling   writes scaling.csv and scaling.png; some ten minutes
    python benchmarks/scaling.py --tiny                             tiny sizes, to see that it works; two minutes

Each point is a run of ``train.py`` in a separate process (PPO on a GPT-2 with random weights), so that it has its own
peak memory. For each phase the fastest iteration counts, without the first. On each axis a line through (log work, log
seconds) gives an exponent: 1 is linear, below 1 fixed costs dominate, above 1 a term grows faster than the work. Work
is the minimum that must be done: sampled tokens, times the share that attention adds (4 c d operations in a layer of
width d at a mean context of c, in addition to 24 d^2 of the linear layers), times the weights per token. The exit code
is 1 when an exponent is above ``--bound``: no cost may grow faster than linearly, except attention's own. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD_WIDTH = 32  # of an attention head
VOCABULARY = 512  # of the embedded tokenizer
PHASES = ("rollout_s", "update_s", "iteration_s")
OVERRIDES = (
    "task=reviews", "model=gpt2_scratch", "algo=ppo", "hardware=cpu", "callbacks=none", "callbacks.checkpoint=null",
    "validation.prompts=1", "validation.every=1000000", "optim.lr=1e-6",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """The sizes of one run."""

    prompts: int
    group: int
    length: int  #: of a completion, tokens at most
    layers: int
    width: int

    @property
    def weights(self) -> int:
        """Weights per token: the linear layers, and the head."""
        return 12 * self.layers * self.width**2 + VOCABULARY * self.width


@dataclass(frozen=True)
class Cost:
    """Seconds and memory of an iteration at a point."""

    tokens: float  #: sampled, mean
    work: float
    rollout_s: float
    update_s: float
    iteration_s: float  #: with rewards and all the rest
    peak_mib: float  #: of the whole process


BASE = Point(prompts=16, group=4, length=32, layers=4, width=128)
TINY = Point(prompts=4, group=2, length=8, layers=2, width=64)
AXES = {
    "prompts": (8, 16, 32, 64, 128),
    "length": (16, 32, 64, 128, 256),
    "group": (2, 4, 8, 16, 32),
    "layers": (2, 4, 8, 16),
    "width": (64, 128, 256, 512),
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="folder for scaling.csv and scaling.png; without it, no files"
    )
    parser.add_argument(
        "--iterations", type=int, default=4, help="of a run, the first not counted (default 4)"
    )
    parser.add_argument("--bound", type=float, default=1.15, help="largest exponent allowed (default 1.15)")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, three per axis; no exponent is refused"
    )
    chosen = parser.parse_args(argv)
    if chosen.iterations < 2:
        parser.error("--iterations must be at least 2: the first is not counted")
    return chosen


def series(tiny: bool) -> dict[str, list[Point]]:
    """The points of each axis, in rising order; all axes contain the base point."""
    if tiny:
        return {axis: [replace(TINY, **{axis: k * getattr(TINY, axis)}) for k in (1, 2, 4)] for axis in AXES}
    return {axis: [replace(BASE, **{axis: value}) for value in values] for axis, values in AXES.items()}


def measure(point: Point, iterations: int) -> Cost:
    """Runs ``train.py`` at a point.

    Raises:
        RuntimeError: when it fails, with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable, "train.py", *OVERRIDES, f"hydra.run.dir={folder}/run", f"iterations={iterations}",
            f"rollout.prompts={point.prompts}", f"rollout.group_size={point.group}",
            f"rollout.max_new_tokens={point.length}", f"model.architecture.n_layer={point.layers}",
            f"model.architecture.n_embd={point.width}", f"model.architecture.n_head={point.width // HEAD_WIDTH}",
        ]  # fmt: skip
        said = Path(folder) / "said"
        with said.open("wb") as out:
            process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=out)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(
                f"{' '.join(words)} ended with {process.returncode}:\n{said.read_text()[-2000:]}"
            )
        rows = [
            row
            for row in csv.DictReader((Path(folder) / "run/metrics.csv").open())
            if row["perf/iteration_s"]
        ]
    length = sum(float(row["train/length"]) for row in rows[1:]) / (len(rows) - 1)
    tokens = length * point.prompts * point.group
    attention = 1 + length / 2 / (6 * point.width)
    return Cost(
        tokens=tokens,
        work=tokens * attention * point.weights,
        peak_mib=usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        **{phase: min(float(row[f"perf/{phase}"]) for row in rows[1:]) for phase in PHASES},
    )


def exponent(costs: Sequence[Cost], phase: str) -> float:
    """Slope of the least-squares line through (log work, log seconds)."""
    x = [math.log(cost.work) for cost in costs]
    y = [math.log(getattr(cost, phase)) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def measure_all(points: list[Point], iterations: int) -> dict[Point, Cost]:
    """Measures each point once; prints the progress and the expected time, by the remaining work."""
    costs: dict[Point, Cost] = {}
    # The start-up of each process, in tokens of the base's model.
    expected = {
        p: 20_000 + iterations * p.prompts * p.group * p.length * p.weights / BASE.weights for p in points
    }
    started = time.perf_counter()
    for number, point in enumerate(points, start=1):
        cost = costs[point] = measure(point, iterations)
        spent, done = time.perf_counter() - started, sum(expected[p] for p in costs)
        left = spent / done * (sum(expected.values()) - done)
        print(
            f"{number}/{len(points)}  {point}  {cost.iteration_s:.2f} s an iteration, {cost.peak_mib:,.0f} MiB; "
            f"{spent:.0f} s so far, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
    return costs


def table(axes: dict[str, list[Point]], costs: dict[Point, Cost]) -> str:
    """A Markdown table: one row per point, and the exponents below each axis."""
    lines = [
        "| axis | value | tokens | rollout s | update s | iteration s | peak MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for axis, points in axes.items():
        for point in points:
            cost = costs[point]
            seconds = " | ".join(f"{getattr(cost, phase):.3f}" for phase in PHASES)
            lines.append(
                f"| {axis} | {getattr(point, axis)} | {cost.tokens:,.0f} | {seconds} | {cost.peak_mib:,.0f} |"
            )
        slopes = " | ".join(f"**{exponent([costs[p] for p in points], phase):.2f}**" for phase in PHASES)
        lines.append(f"| {axis} | exponent | | {slopes} | |")
    return "\n".join(lines)


def write(folder: Path, axes: dict[str, list[Point]], costs: dict[Point, Cost]) -> None:
    """Writes ``scaling.csv``, with one row per point of each axis, and ``scaling.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scaling.csv").open("w", newline="") as file:
        rows = [
            {"axis": axis, **asdict(p), **asdict(costs[p])} for axis, points in axes.items() for p in points
        ]
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    size = (2.6 * len(axes), 2.6)
    figure, panels = plt.subplots(1, len(axes), figsize=size, layout="constrained", squeeze=False)
    for panel, (axis, points) in zip(panels[0], axes.items(), strict=True):
        for phase in PHASES[:2]:
            slope = exponent([costs[p] for p in points], phase)
            x, y = [getattr(p, axis) for p in points], [getattr(costs[p], phase) for p in points]
            panel.loglog(x, y, "o-", markersize=3, label=f"{phase.removesuffix('_s')}: {slope:.2f}")
            panel.set_xticks(x, [str(value) for value in x])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.legend(fontsize="small", frameon=False)
    panels[0, 0].set_ylabel("seconds an iteration")
    figure.savefig(folder / "scaling.png", dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = arguments(argv)
    axes = series(chosen.tiny)
    costs = measure_all(list(dict.fromkeys(p for points in axes.values() for p in points)), chosen.iterations)
    print(table(axes, costs))
    if chosen.out:
        write(chosen.out, axes, costs)
    slopes = {
        axis: {phase: round(exponent([costs[p] for p in points], phase), 3) for phase in PHASES}
        for axis, points in axes.items()
    }
    worst = max(value for phases in slopes.values() for value in phases.values())
    linear = worst <= chosen.bound
    print(json.dumps({"exponents": slopes, "worst": worst, "bound": chosen.bound, "linear": linear}))
    return 0 if linear or chosen.tiny else 1


if __name__ == "__main__":
    sys.exit(main())
