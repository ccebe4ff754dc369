"""The commands of ``runs.py``: a list of runs, a comparison of two, and `clean`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from policylab.callbacks.tables import console
from policylab.cli.commands import FILTERS
from policylab.config.checks import check_switch
from policylab.errors import UserError, counted
from policylab.launch.clean import leftovers, remove
from policylab.runs.figures import headlines, number
from policylab.runs.run import Run, list_runs, load_run
from policylab.runs.status import DONE, FAILED, RUNNING
from policylab.runs.words import command, leaves
from policylab.user_code import cut, short_path

STYLES = {RUNNING: "bold", DONE: "green", FAILED: "bold red"}
#: Most characters of a value in a comparison.
VALUE = 60
#: Values of the config that differ between any two runs: folders.
FOLDERS = re.compile(r"(paths|resume)\b|.*\brun_dir$")
#: The columns of the list; it can be sorted by all but the last.
COLUMNS = ("state", "task", "algo", "model", "seed", "reward", "iterations", "age", "folder")


@dataclass(frozen=True)
class Line:
    """A run in the list, by column."""

    cells: dict[str, str]
    order: dict[str, Any]  #: what the list is sorted by


def line_of(run: Run, where: Path) -> Line:
    """The line of a run below a folder."""
    status, summary = run.status, run.summary
    names = {"state": run.state} | {part: run.named(part) for part in ("task", "algo", "model")}
    before, after = (summary[when].get("val/reward") for when in ("before", "after"))
    done, all_, started = status.get("iteration", 0), status.get("iterations"), status.get("started")
    age = (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds() if started else math.inf
    seed = run.config.get("seed")
    cells = {
        "seed": "" if seed is None else str(seed),
        "reward": "" if after is None else f"{number(before)} -> {number(after)}",
        "iterations": f"{done}/{all_}" if all_ else str(done),
        "age": ago(age),
        "folder": os.path.relpath(run.path, where),
    }
    order = {
        "seed": math.inf if seed is None else seed,
        "reward": math.inf if after is None else -after,
        "iterations": -done,
        "age": age,
    }
    return Line(names | cells, names | order)


def runs_job(config: DictConfig) -> None:
    """The Hydra task of ``runs.py``."""
    where = Path(config.paths.logs)
    check(config)
    if config.command == "list":
        show(
            where,
            {key: value.strip("[]").split(",") for key, value in config.only.items() if value},
            config.sort,
        )
    elif config.command == "compare":
        compare(*(load_run(run, where) for run in config.runs))
    else:
        clean(where, config.remove)


def check(config: DictConfig) -> None:
    """Refuses an unknown command, and values that the command does not use.

    Raises:
        UserError: naming the value.
    """
    takes = {"list": (*FILTERS, "sort"), "compare": ("runs",), "clean": ("remove",)}
    if config.command not in takes:
        raise UserError(f"{config.command} is not a command of runs.py; choose from {', '.join(takes)}")
    check_switch("remove", config.remove)
    values = {**config.only, **{key: config[key] for key in ("sort", "runs", "remove")}}
    if foreign := [key for key, value in values.items() if value and key not in takes[config.command]]:
        raise UserError(
            f"{config.command} takes no {foreign[0]}; it takes {', '.join(takes[config.command])}"
        )
    if config.command == "compare" and len(config.runs) != 2:
        raise UserError(
            f"compare takes two runs, and was given {len(config.runs)}: {command('runs.py', 'compare', 'A', 'B')}"
        )
    if config.sort not in (None, *COLUMNS[:-1]):
        raise UserError(f"sort={config.sort} is not a column; choose from {', '.join(COLUMNS[:-1])}")


def show(where: Path, only: dict[str, list[str]], order: str | None) -> None:
    """Prints the list.

    Raises:
        UserError: when no run has the names of a filter.
    """
    runs = list_runs(where, **only)
    lines = [line_of(run, where) for run in (runs or list_runs(where))]
    if not lines:
        console().print(f"no run in {short_path(where)}")
        return
    if not runs:
        asked = " ".join(f"{key}={','.join(names)}" for key, names in only.items())
        there = [f"{key}={','.join(sorted({line.cells[key] for line in lines}))}" for key in only]
        raise UserError(f"no run in {short_path(where)} has {asked}; there are {' '.join(there)}")
    lines.sort(key=lambda line: line.order[order or "age"])
    rows = [COLUMNS, *([line.cells[column] for column in COLUMNS] for line in lines)]
    styles = ["dim", *(STYLES.get(line.cells["state"], "") for line in lines)]
    console().print(aligned(rows, styles, right=(4, 6, 7)), soft_wrap=True)


def compare(one: Run, other: Run) -> None:
    """Prints the settings that differ between two runs, and their results."""
    runs = (one, other)
    names = [["A", short_path(one.path), one.state], ["B", short_path(other.path), other.state]]
    console().print(aligned(names), soft_wrap=True)
    settings = [dict(leaves(OmegaConf.to_container(run.config))) for run in runs]
    keys = [key for key in settings[0] | settings[1] if not FOLDERS.match(key)]
    differ = [
        [key, *(cut(str(setting.get(key, "-")), VALUE) for setting in settings)]
        for key in keys
        if settings[0].get(key) != settings[1].get(key)
    ]
    console().print()
    console().print(aligned([["config", "A", "B"], *differ], ["dim"]), soft_wrap=True)
    if not differ:
        console().print("no setting differs")
    before, after = (results(run) for run in runs)
    rows = [["result", "A", "B", "B - A"]]
    for name in before | after:
        a, b = before.get(name), after.get(name)
        rows.append([name, number(a), number(b), "-" if a is None or b is None else f"{b - a:+.4g}"])
    console().print()
    console().print(aligned(rows, ["dim"], right=(1, 2, 3)), soft_wrap=True)


def results(run: Run) -> dict[str, float]:
    """The numbers of a run's summary, by name."""
    summary = run.summary
    before, after, best = summary["before"], summary["after"], summary["best"]
    found = {f"{name} before": before[name] for name in headlines(before)[:1]}
    found |= {name: after[name] for name in headlines(after)}
    if best:
        found[f"best {best['metric']}"] = best["value"]
    totals = {"iterations": "iterations", "seconds": "wall_seconds", "tokens sampled": "tokens_sampled"}
    return found | {name: summary[key] for name, key in totals.items() if summary.get(key) is not None}


def clean(where: Path, really: bool) -> None:
    """Prints the folders of runs that never began; removes them if asked to."""
    count, size = 0, 0
    for folder, reason, content in leftovers(where):
        if really:
            remove(folder, where)
        count, size = count + 1, size + content
        does = "removed" if really else "would remove"
        console().print(f"{does} {short_path(folder)} ({reason}; {content:,} bytes)", soft_wrap=True)
    total = f"{counted(count, 'folder')}, {size:,} bytes"
    if not count:
        console().print(f"nothing to remove in {short_path(where)}")
    else:
        console().print(f"removed {total}" if really else f"{total}: remove=true removes them")


def aligned(rows: Sequence[Sequence[str]], styles: Sequence[str] = (), right: Sequence[int] = ()) -> Text:
    """Rows with columns of equal width. Print it with ``soft_wrap``, so that no path is broken.

    Args:
        styles: of the first rows.
        right: numbers of the columns that are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    padded = [*styles, *[""] * (len(lines) - len(styles))]
    return Text("\n").join(Text(line, style=style) for line, style in zip(lines, padded, strict=True))


def ago(seconds: float) -> str:
    """The age of a run in its largest unit; empty where it is not known.

    >>> ago(42), ago(3700), ago(200000)
    ('42 s', '1 h', '2 d')
    """
    if seconds == math.inf:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"
