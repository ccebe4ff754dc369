"""Finds the folder and the checkpoint of a run from a command-line argument."""

from __future__ import annotations

from pathlib import Path

from policylab.errors import UserError

LATEST = "latest"
#: The link to the newest sweep, and the file that every sweep has.
LATEST_SWEEP, SWEEP_FILE = "latest_sweep", "sweep.jsonl"


def logs_folder() -> Path:
    """The default folder of runs: ``logs/`` in the repository of the scripts."""
    from omegaconf import OmegaConf

    return Path(str(OmegaConf.create({"logs": "${repo:}/logs"}).logs))


def find_run(run: str | Path, logs: Path | None = None) -> Path:
    """The folder of a run.

    Args:
        run: a run folder, any path inside one (such as a checkpoint), or "latest".
        logs: folder of "latest"; None: ``logs/`` of the repository.

    Raises:
        UserError: when there is no such path, or no run in it.
    """
    if str(run) == LATEST:
        path = (logs or logs_folder()) / LATEST
        if not path.exists():
            raise UserError(
                f"run=latest, but {path} does not exist; train first, or give the folder of a run"
            )
    else:
        path = Path(str(run)).expanduser()
        if not path.exists():
            raise UserError(f"no run at {path.absolute()}; give the folder of a run, or run=latest")
    path = path.resolve()
    for folder in (path, *path.parents):
        if (folder / "config.yaml").is_file() and (folder / "status.json").is_file():
            return folder
    raise UserError(f"{path} is not a run folder: it has no config.yaml with a status.json beside it")


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
            f"{path.absolute()} is no sweep: it has no {SWEEP_FILE}; give the folder of a multirun, or sweep=latest"
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
