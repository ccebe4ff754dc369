"""Reads run folders, and committed results folders."""

from __future__ import annotations

import csv
import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from policylab.errors import UserError
from policylab.runs.find import find_run, find_runs, run_around, runs_in
from policylab.runs.metrics_file import curves_of
from policylab.runs.run import Run as RunFolder
from policylab.runs.saved_config import load_config
from policylab.runs.status import DONE, read_status

ITERATION, TOKENS, KL = "iteration", "train/tokens", "val/kl"
FILES = ("config.yaml", "metrics.csv", "status.json")


@dataclass(frozen=True)
class Run:
    """One run folder, read.

    ``curves`` maps a column of ``metrics.csv`` to its values: ``{"val/reward": {0: 0.12, 10: 0.31}}``, by
    iteration; iteration 0 is the validation before training.
    """

    folder: Path
    config: dict[str, Any]
    status: str  #: running | done | failed | interrupted
    summary: dict[str, Any]  #: of a run that did not finish: so far
    curves: dict[str, dict[int, float]]
    label: str = ""  #: name of its group, if it is read from a results folder
    parents: Sequence[dict[str, Any]] = ()  #: its ancestors, the nearest first

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def names(self) -> list[str]:
        """Names of algorithm, model and task; empty if there is none."""
        parts = (self.config.get(part) for part in ("algo", "model", "task"))
        return [str(part["name"]) if isinstance(part, dict) and "name" in part else "" for part in parts]

    def curve(self, metric: str) -> dict[int, float]:
        """The values of one metric by iteration, in order.

        Raises:
            UserError: when the run has none, or one that is not finite.
        """
        values = self.curves.get(metric)
        if not values:
            known = ", ".join(sorted(name for name in self.curves if name.startswith("val/")))
            raise UserError(f"{self.folder} has no {metric}; it has {known or 'no validation'}")
        for iteration, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{metric} is {value} at iteration {iteration} of {self.folder}; leave it out"
                )
        return values

    def along(self, metric: str, x: str) -> dict[float, float]:
        """The values of a metric by the values of another column at the same iterations.

        Args:
            x: "iteration"; a column that grows with it, 0 before the first iteration; or "val/kl", where only points
                with a higher KL than all before them are kept.

        Raises:
            UserError: when the run lacks either.
        """
        values = self.curve(metric)
        if x == ITERATION:
            return {float(iteration): value for iteration, value in values.items()}
        if x not in self.curves:
            raise UserError(f"{self.folder} has no {x} to draw {metric} by; take x=iteration at_kl=[]")
        places = {0: 0.0} | self.curves[x]
        points = {places[iteration]: value for iteration, value in values.items() if iteration in places}
        furthest = accumulate(points, max)
        return {place: points[place] for place in dict.fromkeys(furthest)} if x == KL else points


def read_runs(runs: str | Sequence[str]) -> list[Run]:
    """The runs that paths, glob patterns and "latest" name, each once, in that order.

    A results folder, written by ``report.py``, gives the runs in its ``metrics.csv``. An unfinished run is left out if
    only a pattern names it (`unfinished`); its own path includes it.

    Raises:
        UserError: when nothing is found, or a path is not a run folder.
    """
    names = _list(runs)
    committed = [name for name in names if is_evidence(Path(name))]
    names = [name for name in names if name not in committed]
    missing = unfinished(names)
    found = [run for name in committed for run in read_evidence(Path(name))]
    found += [read_run(folder) for folder in find_runs(names) if folder not in missing]
    if not found:
        left = f"; not finished: {', '.join(map(str, missing))}" if missing else ""
        raise UserError(f"no run at {', '.join(names)}{left}; give folders or a quoted pattern: 'logs/*/*/*'")
    return found


def unfinished(runs: str | Sequence[str]) -> dict[Path, str]:
    """Folders of unfinished runs that only a pattern names, with their status."""
    names = _list(runs)
    named = {find_run(name) for name in names if not glob.has_magic(name) and not is_evidence(Path(name))}
    patterns = [name for name in names if glob.has_magic(name)]
    status = {folder: str(read_status(folder)["status"]) for folder in find_runs(patterns)}
    return {folder: word for folder, word in status.items() if word != DONE and folder not in named}


def _list(runs: str | Sequence[str]) -> list[str]:
    """The names, with an experiment's folder replaced by the pattern of all its runs."""
    names = [runs] if isinstance(runs, str) else list(runs)
    return [f"{glob.escape(name)}/*" if _is_experiment(Path(name)) else name for name in names]


def _is_experiment(folder: Path) -> bool:
    return run_around(folder) is None and bool(runs_in(folder))


def read_run(folder: Path) -> Run:
    """One run folder.

    Raises:
        UserError: when a file of ``FILES`` is missing.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not a run folder: it has no {' and no '.join(missing)}")
    run = RunFolder(folder)
    config = OmegaConf.to_container(run.config)
    assert isinstance(config, dict)
    return Run(
        folder=folder,
        config={str(key): value for key, value in config.items()},
        status=str(run.status["status"]),
        summary=run.summary,
        curves=run.curves,
        parents=run.parents,
    )


def is_evidence(folder: Path) -> bool:
    """Whether ``report.py`` has written this folder: its rows name run and seed."""
    path = folder / "metrics.csv"
    return path.is_file() and path.open(encoding="utf-8").readline().startswith("run,seed,iteration")


def read_evidence(folder: Path) -> list[Run]:
    """The runs in the ``metrics.csv`` of a results folder, with their names there.

    Seconds and the settings of each group are unknown, because that file does not have them.
    """
    config = OmegaConf.to_container(load_config(folder))
    assert isinstance(config, dict)
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            of_run = rows.setdefault((row.pop("run"), row.pop("seed")), [])
            of_run.append({name: float(cell) for name, cell in row.items() if cell})
    return [
        Run(
            folder,
            {str(key): value for key, value in config.items()} | {"seed": int(seed)},
            "done",
            {},
            curves_of(of_run),
            label,
        )
        for (label, seed), of_run in rows.items()
    ]
