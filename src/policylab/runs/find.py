"""Finds the folder and the checkpoint of a run from a command-line argument."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from policylab.errors import UserError
from policylab.runs.status import read_status

LATEST = "latest"
#: The link to the newest sweep, and the file that every sweep has.
LATEST_SWEEP, SWEEP_FILE = "latest_sweep", "sweep.jsonl"
#: The file in an exported policy that has its iteration.
STAMP = "policylab.json"


def logs_folder() -> Path:
    """The default folder of runs: ``logs/`` in the repository of the scripts."""
    from omegaconf import OmegaConf

    return Path(str(OmegaConf.create({"logs": "${repo:}/logs"}).logs))


def find_run(run: str | Path, logs: Path | None = None) -> Path:
    """The folder of a run.

    Args:
        run: a run folder, any path inside one (such as a checkpoint), or "latest". An experiment's folder, such as
            ``logs/reviews/ppo-tiny``, or its name under ``logs/``, ``reviews/ppo-tiny`` or ``ppo-tiny``, means its
            newest run.
        logs: folder of "latest" and of experiments; None: ``logs/`` of the repository.

    Raises:
        UserError: when there is no such path, or no run in it.
    """
    logs = logs or logs_folder()
    path = logs / LATEST if str(run) == LATEST else Path(str(run)).expanduser()
    places = [path] if path.exists() else [place for place in named(str(run), logs) if place.exists()]
    if not places:
        problem = f"there is no {path}" if str(run) == LATEST else f"no run at {path.absolute()}"
        raise UserError(
            f"{problem}; give the folder of a run, the name of an experiment in {logs}, or latest"
        )
    for place in places:
        if (folder := run_around(place)) is not None:
            return folder
    if runs := [folder for place in places for folder in runs_in(place)]:
        return max(runs, key=lambda folder: (str(read_status(folder).get("started")), folder.name))
    raise UserError(
        f"{places[0].resolve()} is not a run folder: it has no config.yaml with a status.json beside it"
    )


def find_runs(runs: str | Sequence[str], logs: Path | None = None) -> list[Path]:
    """The folders of runs, each once, in the given order.

    Args:
        runs: a name for `find_run`, or a glob pattern; several as a list or separated by commas.
        logs: as for `find_run`.

    Raises:
        UserError: when a name or a pattern matches no run.
    """
    if isinstance(runs, str):
        listed = runs[1:-1] if runs.startswith("[") and runs.endswith("]") else runs
        runs = [runs] if os.path.exists(os.path.expanduser(runs)) else listed.split(",")
    found = [folder for name in runs for folder in matching(name.strip(), logs)]
    return list(dict.fromkeys(found))


def matching(name: str, logs: Path | None) -> list[Path]:
    """The run folder of a name, or those that a glob pattern matches.

    Raises:
        UserError: when there is none.
    """
    if not glob.has_magic(name) or Path(name).exists():
        return [find_run(name, logs)]
    paths = sorted(Path(path).resolve() for path in glob.glob(str(Path(name).expanduser()), recursive=True))
    if not (runs := list(filter(is_run, paths))):
        raise UserError(f"no run at {name}; give a pattern of run folders, such as 'logs/reviews/*/*'")
    return runs


def named(name: str, logs: Path) -> list[Path]:
    """Possible folders of an experiment with this name, with or without its task."""
    return [logs / name, *(folder / name for folder in logs.glob("[!.]*") if folder.name != LATEST)]


def run_around(path: Path) -> Path | None:
    """The run folder that contains a path, or is the path; None if there is none."""
    return next(filter(is_run, (path.resolve(), *path.resolve().parents)), None)


def runs_in(folder: Path) -> list[Path]:
    """The runs of an experiment's folder."""
    return list(filter(is_run, (path.resolve() for path in folder.iterdir()))) if folder.is_dir() else []


def runs_below(folder: Path) -> Iterator[Path]:
    """All runs in a folder, at any depth. Links, such as ``latest``, and hidden folders are left out."""
    for place, inner, _ in os.walk(folder):
        if is_run(Path(place)):
            yield Path(place)
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / "config.yaml").is_file() and (folder / "status.json").is_file()


def find_sweep(sweep: str | Path, logs: Path | None = None) -> Path:
    """The folder of a sweep.

    Args:
        sweep: the folder, or "latest".
        logs: where "latest" is looked for; None takes ``logs/`` of the repository.

    Raises:
        UserError: when there is no such folder, or no sweep in it.
    """
    latest = str(sweep) == LATEST
    path = (logs or logs_folder()) / LATEST_SWEEP if latest else Path(str(sweep)).expanduser()
    if latest and not path.exists():
        raise UserError(
            f"sweep=latest, but {path} does not exist; start one first, or give the folder of a sweep"
        )
    if not (path / SWEEP_FILE).is_file():
        raise UserError(
            f"{path.absolute()} is not a sweep: it has no {SWEEP_FILE}; give the folder of a multirun, or sweep=latest"
        )
    return path.resolve()


def find_checkpoint(run_folder: Path, checkpoint: str | Path) -> Path:
    """A checkpoint file of a run.

    Args:
        run_folder: folder of the run.
        checkpoint: "best", "last", or a path to a file.

    Raises:
        UserError: when there is no such file.
    """
    if str(checkpoint) in ("best", "last"):
        path = run_folder / "checkpoints" / f"{checkpoint}.ckpt"
    else:
        path = Path(str(checkpoint)).expanduser()
    if path.is_file():
        return path.resolve()
    found = sorted(p.stem for p in (run_folder / "checkpoints").glob("*.ckpt"))
    choices = f"this run has {', '.join(found)}" if found else "this run has saved none"
    raise UserError(f"no checkpoint at {path}; {choices}")


def find_policy(run_folder: Path, which: str) -> Path:
    """The folder of a policy that a run has exported.

    Args:
        which: "best" or "final".

    Raises:
        UserError: when there is none.
    """
    folder = run_folder / "model" / which
    if folder.is_dir():
        return folder
    there = sorted(path.name for path in (run_folder / "model").glob("[!.]*"))
    raise UserError(f"no policy at {folder}; this run has exported {', '.join(there) or 'none'}")


def exported_iteration(folder: Path) -> int | None:
    """The iteration of an exported policy; None if there is no complete one."""
    stamp = folder / STAMP
    return int(json.loads(stamp.read_text())["iteration"]) if stamp.is_file() else None


def checkpoint_to_resume(resume: str) -> Path | None:
    """The checkpoint that ``resume=...`` means: the file itself, or the newest whole one of a run folder; None if the
    run has not saved one yet.

    Raises:
        UserError: when the file is damaged.
    """
    from policylab.runs.checkpoints import newest_whole_checkpoint
    from policylab.runs.damage import check_undamaged

    path = Path(resume).expanduser()
    if path.is_file():
        return check_undamaged(path.resolve())
    return newest_whole_checkpoint(find_run(resume))
