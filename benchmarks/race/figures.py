"""Medians, ratios with their spread, tables. Pure functions."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

#: Phases of an iteration, in order; together they are the whole iteration.
PHASES = ("rollout", "evaluation", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Lap:
    """Seconds of one iteration.

    Attributes:
        rollout: inside the engine, or inside `generate`.
        evaluation: the rest before the update: old, reference and value forward passes, rewards, advantages.
        loss: forward pass of the update, and all other work except backward pass and optimizer.
    """

    seconds: float
    rollout: float
    evaluation: float
    loss: float
    backward: float
    optimizer: float

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """From what a worker says: our side tells the update's seconds, TRL's when its loss began."""
        seconds, clock = answer["seconds"], answer["clock"]
        before = seconds - answer["update"] if "update" in answer else clock["before_loss"]
        return cls(
            seconds=seconds,
            rollout=clock["rollout"],
            evaluation=before - clock["rollout"],
            loss=seconds - before - clock["backward"] - clock["optimizer"],
            backward=clock["backward"],
            optimizer=clock["optimizer"],
        )


def median_lap(laps: Sequence[Lap]) -> Lap:
    """The median of each column."""
    return Lap(
        **{name: statistics.median(getattr(lap, name) for lap in laps) for name in ("seconds", *PHASES)}
    )


@dataclass(frozen=True)
class Ratio:
    """TRL's seconds divided by ours: of the medians, and the lowest and highest of a pair."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, laps: Sequence[tuple[Lap, Lap]]) -> Self:
        ours, theirs = zip(*laps, strict=True)
        pairs = [other.seconds / mine.seconds for mine, other in laps]
        return cls(median_lap(theirs).seconds / median_lap(ours).seconds, min(pairs), max(pairs))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table; the first column is left-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def side_by_side(laps: Sequence[tuple[Lap, Lap]]) -> str:
    """Medians of both sides by phase, in seconds."""
    rows = []
    for name, lap in zip(("ours", "TRL"), map(median_lap, zip(*laps, strict=True)), strict=True):
        rows.append([name, *(f"{getattr(lap, column):.3f}" for column in ("seconds", *PHASES))])
    return table(["", "iteration", *PHASES], rows)


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Adds a row to a CSV; a new file gets a header.

    Raises:
        ValueError: when the file has other columns.
    """
    new = not file.exists()
    if not new:
        with file.open(newline="") as handle:
            columns = next(csv.reader(handle))
        if columns != list(record):
            raise ValueError(f"{file} has other columns than this race; take a new file")
    with file.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(record), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(record)
