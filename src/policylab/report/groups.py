"""Groups runs that differ only in the seed, and checks that runs may be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policylab.errors import UserError, counted
from policylab.report.read import ITERATION, KL, Run
from policylab.report.statistics import Estimate, estimate

# Keys that do not change the results of a run: its name, its loggers, its folder.
NOT_THE_EXPERIMENT = ("seed", "name", "tags", "resume", "init", "paths", "hydra", "logger")
NOT_THE_EXPERIMENT_ANYWHERE = ("seed", "run_dir")
# Runs are comparable if these values are equal.
MEASURED_BY = ("task", "reward", "validation.prompts", "rollout.max_new_tokens")
# Exceptions: the folder of the data, and the processes that compute the reward.
NOT_MEASURED = ("reward.workers", "reward.pool", "task.data_dir")


@dataclass(frozen=True)
class Group:
    """The seeds of one experiment."""

    label: str
    runs: tuple[Run, ...]

    def over_seeds(self, metric: str, x: str) -> dict[float, Estimate]:
        """Statistics along ``x``, up to the last point that every seed reaches.

        Args:
            x: "iteration": at the iterations that every seed has. Any other column has different values for each seed,
                so each seed is interpolated linearly at the points of all seeds.
        """
        curves = [run.along(metric, x) for run in self.runs]
        if x == ITERATION:
            shared = sorted(set.intersection(*(set(curve) for curve in curves)))
            return {point: estimate([curve[point] for curve in curves]) for point in shared}
        end = min(max(curve) for curve in curves)
        points = sorted({point for curve in curves for point in curve if point <= end})
        values = [np.interp(points, list(curve), list(curve.values())) for curve in curves]
        return {point: estimate(column) for point, column in zip(points, np.transpose(values), strict=True)}

    def at_kl(self, metric: str, nats: float) -> list[float]:
        """The metric of each seed when it first reaches this KL, interpolated linearly between validations.

        Leaves out seeds that never reach it, or start beyond it.
        """
        curves = [run.along(metric, KL) for run in self.runs]
        return [
            float(np.interp(nats, list(curve), list(curve.values())))
            for curve in curves
            if min(curve) <= nats <= max(curve)
        ]

    def ends(self, metric: str) -> list[float]:
        """The last value of each seed."""
        return [list(run.curve(metric).values())[-1] for run in self.runs]

    def gains(self, metric: str) -> list[float]:
        """For each seed the last value minus the first."""
        starts = [next(iter(run.curve(metric).values())) for run in self.runs]
        return [after - before for after, before in zip(self.ends(metric), starts, strict=True)]


def group_runs(runs: Sequence[Run], labels: Sequence[str] = ()) -> list[Group]:
    """Groups runs by all settings except the seed, in the order of their first run.

    Args:
        runs: at least one.
        labels: names for the groups, in order. Without any: ``algo-model-task``, without the parts that all groups
            share, and the settings that differ. Runs from a results folder keep their name.

    Raises:
        UserError: when the runs were not measured in the same way, a seed appears twice in a group, two groups have
            one name, or the labels do not fit the groups.
    """
    _check_comparable(runs)
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.label or json.dumps(_settings(run), sort_keys=True), []).append(run)
    members = [sorted(group, key=lambda run: run.seed) for group in grouped.values()]
    for group in members:
        _check_seeds(group)
    names = list(labels) or _names([group[0] for group in members])
    if len(names) != len(members):
        own = ", ".join(_names([group[0] for group in members]))
        raise UserError(
            f"{counted(len(names), 'label')} for {counted(len(members), 'group')} of runs: {own}; give one label "
            "a group"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"several groups of runs are called {', '.join(twice)}; give one label a group")
    return [Group(name, tuple(group)) for name, group in zip(names, members, strict=True)]


def _check_comparable(runs: Sequence[Run]) -> None:
    settings = [_flatten(run.config) for run in runs]
    for key in sorted(set().union(*settings)):
        measured = any(key == part or key.startswith(part + ".") for part in MEASURED_BY)
        if not measured or key in NOT_MEASURED:
            continue
        for run, setting in zip(runs, settings, strict=True):
            if setting.get(key) != settings[0].get(key):
                raise UserError(
                    f"the runs are not comparable: {key} is {settings[0].get(key)} in {runs[0].folder} "
                    f"and {setting.get(key)} in {run.folder}; report them separately"
                )


def _check_seeds(group: Sequence[Run]) -> None:
    (seed, count), *_ = Counter(run.seed for run in group).most_common()
    if count > 1:
        folders = ", ".join(str(run.folder) for run in group if run.seed == seed)
        raise UserError(
            f"seed {seed} of the same experiment appears {count} times: {folders}; keep one of them"
        )


def _names(runs: Sequence[Run]) -> list[str]:
    """``algo-model-task`` for each run, without the parts that all share, unless no part is left.

    Runs with the same name add the settings in which they differ.
    """
    if any(run.label for run in runs):
        fresh = iter(_names([run for run in runs if not run.label]))
        return [run.label or next(fresh) for run in runs]
    parts = [run.names for run in runs]
    differing_parts = [values for values in zip(*parts, strict=True) if len(set(values)) > 1] or list(
        zip(*parts, strict=True)
    )
    bases = ["-".join(part for part in name if part) for name in zip(*differing_parts, strict=True)]
    settings = [_settings(run) for run in runs]
    names = []
    for base, setting in zip(bases, settings, strict=True):
        same_name = [other for other, name in zip(settings, bases, strict=True) if name == base]
        differing = [
            f"{key}={setting.get(key)}"
            for key in sorted(set().union(*same_name))
            if len({str(other.get(key)) for other in same_name}) > 1
        ]
        names.append(" ".join([base, *differing]))
    return names


def _settings(run: Run) -> dict[str, Any]:
    """The settings that define the experiment, flat: ``{"optim.lr": 1e-5, ...}``.

    Other seeds, such as that of random weights, depend on the run's seed and are left out; the task's own seed decides
    its data and is kept. A parent is compared by its name, because each seed may have started from its own run.
    """
    flat = _flatten(run.config)
    if run.parents:
        flat["model.path"] = ", from ".join(
            f"{parent['policy']} of {parent['name']}" for parent in run.parents
        )
    return {
        key: value
        for key, value in flat.items()
        if key.split(".")[0] not in NOT_THE_EXPERIMENT
        and (key.startswith("task.") or key.split(".")[-1] not in NOT_THE_EXPERIMENT_ANYWHERE)
    }


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
