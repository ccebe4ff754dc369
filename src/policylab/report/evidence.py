"""Writes the results folder of a recipe, which is committed with it, from finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.errors import UserError
from policylab.report.groups import Group, group_runs
from policylab.report.page import PAGE, write_page
from policylab.report.plots import draw_curves
from policylab.report.ranking import by_gain, draw_ranking
from policylab.report.read import ITERATION, KL, TOKENS, read_runs, unfinished
from policylab.report.tables import kl_table, markdown_table, write_metrics
from policylab.runs.find import find_run
from policylab.runs.parents import lineage


def report_job(config: DictConfig) -> None:
    """The Hydra task of ``report.py``: the page of one run, or else `write_evidence`, whose arguments the config has.

    Raises:
        UserError: without runs, or with both ``run`` and ``runs``.
    """
    settings = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    if (settings["run"] is None) == (settings["runs"] is None):
        raise UserError("give run=RUN for the page of one run, or runs=RUNS for results over seeds")
    if settings["run"] is not None:
        folder = find_run(settings["run"])
        page = Path(settings["out"] or folder / PAGE)
        write_page(folder, page)
        print(f"written to {page}")
        return
    if settings["out"] is None:
        raise UserError("out is missing; give the folder for the results: out=FOLDER")
    table = write_evidence(
        runs=settings["runs"],
        out=Path(settings["out"]),
        metrics=settings["metrics"],
        title=settings["title"],
        labels=settings["labels"],
        x=settings["x"],
        ranked=settings["ranked"],
        at_kl=settings["at_kl"],
    )
    print(f"{table}\nwritten to {settings['out']}")


def write_evidence(
    runs: str | Sequence[str],
    out: Path,
    metrics: Sequence[str],
    title: str,
    labels: Sequence[str],
    x: str,
    ranked: bool,
    at_kl: Sequence[float],
) -> str:
    """Writes ``metrics.csv``, ``curve.png``, ``table.md`` and ``config.yaml`` to a folder.

    With several groups of runs also ``ranking.png``; with ``at_kl`` also ``frontier.png`` and ``frontier.md``.

    Args:
        runs: run folders, patterns that find them, "latest", or folders that this function has written.
        out: created if it is missing; files of these names in it are replaced, others are kept.
        metrics: the table shows the first one; the curve has a panel for each.
        title: of the curve.
        labels: names of the groups of runs, in order; empty for ``algo-model-task``.
        x: x axis of the curve: "iteration", or "train/tokens".
        ranked: whether the largest gain comes first; otherwise the order of the runs.
        at_kl: KLs to the reference, nats a sequence, at which the first metric is compared; empty for none.

    Returns:
        The tables, in Markdown.

    Raises:
        UserError: when there are no runs, or they are not comparable or lack a metric, or ``out`` is no folder for it.
    """
    if out.is_file():
        raise UserError(f"out={out} is a file; give a folder")
    if (out / "status.json").exists():
        raise UserError(
            f"out={out} is the folder of a run, whose metrics and config would be lost; give another one"
        )
    if not metrics:
        raise UserError("metrics is empty; name at least one, such as metrics=[val/reward,val/kl]")
    if x not in (ITERATION, TOKENS):
        raise UserError(f"x is {x}; choose {ITERATION} or {TOKENS}")
    found = read_runs(runs)
    groups = group_runs(found, labels)
    for run in found:
        curves = [run.curve(metric) for metric in metrics]  # raises before anything is written
        if 0 not in curves[0]:
            raise UserError(f"{run.folder} has no {metrics[0]} at iteration 0: no baseline, so no gain")
        for axis in [x, KL] if at_kl else [x]:
            run.along(metrics[0], axis)
    if ranked:
        groups = by_gain(groups, metrics[0])
    table = markdown_table(groups, metrics[0]) + descent(groups) + left_out(unfinished(runs))
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(groups, metrics, x, title, out / "curve.png")
    if len(groups) > 1:
        draw_ranking(groups, metrics, title, out / "ranking.png")
    write_metrics(groups, metrics, x, out / "metrics.csv")
    (out / "table.md").write_text(table, encoding="utf-8")
    OmegaConf.save(OmegaConf.create(portable(found[0].config)), out / "config.yaml")
    if not at_kl:
        return table
    frontier = kl_table(groups, metrics[0], sorted(at_kl))
    draw_curves(groups, metrics[:1], KL, title, out / "frontier.png", until=max(at_kl))
    (out / "frontier.md").write_text(frontier, encoding="utf-8")
    return f"{table}\n{frontier}"


def descent(groups: Sequence[Group]) -> str:
    """A paragraph for each group whose runs started from other runs, with all their ancestors."""
    return "".join(
        f"\n{group.label} started from {'; '.join(dict.fromkeys(found))}.\n"
        for group in groups
        if (found := [lineage(run.parents) for run in group.runs if run.parents])
    )


def left_out(runs: Mapping[Path, str]) -> str:
    """A paragraph that names unfinished runs, so that no failed seed is overlooked; empty without any."""
    listed = ", ".join(f"{Path(*folder.parts[-2:])} ({status})" for folder, status in runs.items())
    return (
        f"\nLeft out, as not finished: {listed}. Finish them, or give their paths to include them.\n"
        if runs
        else ""
    )


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without values that are specific to one machine.

    Hydra's own settings and ``paths`` are left out; the run folder becomes ``${paths.run}`` again, and paths in the
    repository or the home directory are relative to it.
    """
    paths = config.get("paths", {})
    renamed = {str(Path.home()): "~"}
    if "repo" in paths:
        renamed = {f"{paths['repo']}/": ""} | renamed
    if "run" in paths:
        renamed = {paths["run"]: "${paths.run}"} | renamed
    return {key: _rename(value, renamed) for key, value in config.items() if key not in ("paths", "hydra")}


def _rename(value: Any, renamed: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _rename(item, renamed) for key, item in value.items()}
    if isinstance(value, list):
        return [_rename(item, renamed) for item in value]
    if isinstance(value, str):
        for old, new in renamed.items():
            value = value.replace(old, new)
    return value
