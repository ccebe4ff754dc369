"""The output at the end of a sweep: results over seeds, failures, and the next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from policylab.errors import UserError
from policylab.runs.words import command, override
from policylab.user_code import short_path


def results(folders: Sequence[Path]) -> list[str]:
    """For each task a table of its finished jobs, or the reason why there is none, and the command of a report.

    Args:
        folders: sorted folders of all finished jobs of a sweep, in the same parent folder.
    """
    from policylab.report.groups import group_runs  # here, because the import takes a second
    from policylab.report.read import Run, read_run
    from policylab.report.tables import markdown_table

    tasks = dict[str, list[Run]]()
    for folder in folders:
        run = read_run(folder)
        tasks.setdefault(str(run.config["task"]["name"]), []).append(run)
    lines = list[str]()
    for task, runs in tasks.items():
        checkpoint = (runs[0].config["callbacks"] or {}).get("checkpoint") or {}
        metric = checkpoint.get("monitor") or "val/reward"
        try:
            table = markdown_table(group_runs(runs), metric)
        except UserError as error:
            table = f"no table: {error}\n"
        out = f"report_{task}" if len(tasks) > 1 else "report"
        words = [selection(task, [run.folder for run in runs], folders)]
        words += [override("out", short_path(folders[0].parent / out))]
        words += [] if metric == "val/reward" else [f"metrics=[{metric}]"]
        lines += [f"{task}, {metric}\n", table, f"report  {command('report.py', *words)}\n"]
    return lines


def selection(task: str, members: Sequence[Path], folders: Sequence[Path]) -> str:
    """The ``runs=`` argument for some of the folders: a pattern that matches only them, or all their paths."""
    prefix = f"{task}_" if len(members) < len(folders) else ""
    if [folder for folder in folders if folder.name.startswith(prefix)] == list(members):
        return override("runs", f"{short_path(members[0].parent)}/{prefix}*")
    return f"runs=[{','.join(short_path(folder) for folder in members)}]"


def same_command(script: str, words: Sequence[str], folder: Path) -> str:
    """The command that resumes a sweep.

    Args:
        words: arguments of this command, without secrets.
    """
    own = ("sweep=", "hydra.sweep.dir=", "hydra.launcher.resume=")
    rest = [word for word in words if not word.startswith(own)]
    return command(short_path(script), *rest, override("sweep", short_path(folder)))


def failures(reasons: Mapping[str, str]) -> list[str]:
    """A line for each failed job."""
    return [f"failed  {label}: {reason}" for label, reason in reasons.items()]
