"""Errors of a group's processes: each process writes its own to a file, and the launcher reads the first one."""

from __future__ import annotations

import json
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from policylab.cli.messages import is_mistake, known, one_line
from policylab.distributed.world import world
from policylab.errors import ProcessFailed, RunError, UserError
from policylab.runs.words import command, override
from policylab.user_code import short_path


def write_error(error: Exception, folder: Path) -> None:
    """Writes the error of this process to a file, for the launcher."""
    here = world()
    content = {
        "time": time.time(),
        "rank": here.rank,
        "restarts": here.restarts,
        "message": one_line(error),
        "known": known(error) is not None,
        "mistake": is_mistake(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    (folder / f"{here.restarts}_{here.rank}.json").write_text(json.dumps(content), encoding="utf-8")


def first_error(folder: Path, failures: dict[int, Any], run_dir: Path) -> Exception:
    """The error of the process that failed first. Later ones on other ranks are only broken connections.

    Args:
        failures: torch's ``ProcessFailure`` by rank.
    """
    rank, failure = next(iter(failures.items()))
    again = command("train.py", override("resume", short_path(run_dir)))
    advice = f"; go on from the last checkpoint: {again}" if (run_dir / "status.json").exists() else ""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        memory = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
        return ProcessFailed(f"the process of rank {rank} was ended by {name}{memory}{advice}")
    return read_error(folder) or ProcessFailed(
        f"the process of rank {rank} ended with code {failure.exitcode} without an error message{advice}"
    )


def read_error(folder: Path) -> Exception | None:
    """The first error of the last group of processes that has written any; None where none has."""
    errors = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    if not errors:
        return None
    last = max(error["restarts"] for error in errors)
    first = min((error for error in errors if error["restarts"] == last), key=lambda error: error["time"])
    if first["known"]:
        return (UserError if first["mistake"] else RunError)(first["message"])
    return ProcessFailed(f"on rank {first['rank']}:\n{first['message'] or first['traceback']}")
