"""A run's checkpoint files: finds the newest one, and reads its iteration and token count."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from policylab.errors import UserError
from policylab.runs.damage import UNREADABLE, damage, read
from policylab.runs.words import word

log = logging.getLogger(__name__)

#: Under ``checkpoints/``: the newest state, and the one before it.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def newest_whole_checkpoint(run_folder: Path) -> Path | None:
    """The newest state of a run that can be read. A warning names those that were skipped.

    Returns:
        None for a run that was killed before it wrote its first.

    Raises:
        UserError: when there are files and all are damaged, or when the machine cannot read one.
    """
    paths = [run_folder / "checkpoints" / name for name in (LAST, PREVIOUS)]
    faults = list[str]()
    for path in paths:
        why = damage(path) if path.exists() else ""
        if why is None:
            if faults:
                log.warning("%s; resuming from %s, the one before it", "; ".join(faults), path)
            return path.resolve()
        faults.append(f"{path} is damaged ({why})" if why else f"{path} is missing")
    if any(path.exists() for path in paths):
        raise UserError(
            f"{'; '.join(faults)}; name another file, such as "
            f"{word('resume', run_folder / 'checkpoints' / 'best.ckpt')}, or start a new run"
        )
    return None


def become_newest(run_folder: Path, checkpoint: Path) -> None:
    """Makes the resumed checkpoint the newest one, so that a run killed before the next save resumes from it again.

    Call this before the records are cut to the checkpoint: with a newer ``last.ckpt`` they would have a gap.
    ``previous.ckpt`` is kept when the run resumes from ``last.ckpt``; a damaged ``last.ckpt`` is renamed and kept.
    """
    last, previous = (run_folder / "checkpoints" / name for name in (LAST, PREVIOUS))
    if checkpoint.resolve() == last.resolve():
        return
    if last.exists() and damage(last):
        os.replace(last, last.with_name(f"{LAST}.damaged"))
    for path in (last, previous):
        if checkpoint.resolve() != path.resolve():
            link_atomically(checkpoint, path)


def link_atomically(source: Path, path: Path) -> None:
    """Creates a hard link atomically, by a rename. A later rename onto ``source`` does not change it.

    Without hard links in the file system, makes a copy.
    """
    if path.exists() and path.samefile(source):  # renaming one hard link onto another does nothing
        return
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def checkpoint_iteration(checkpoint: Path) -> int:
    """The number of finished iterations when a checkpoint was written."""
    return int(checkpoint_state(checkpoint)["iteration"])


def checkpoint_state(checkpoint: Path) -> dict[str, Any]:
    """The progress of the run at a checkpoint: ``iteration`` and ``tokens_sampled``.

    Raises:
        UserError: when the file is damaged, or was not written by policylab.
    """
    try:
        content = read(checkpoint)
        if not isinstance(content, dict) or "policylab" not in content:
            raise UserError(
                f"{checkpoint} was not written by policylab; take one of a run's checkpoints/ folder"
            )
        return {name: content["policylab"][name] for name in ("iteration", "tokens_sampled")}
    except UNREADABLE as error:
        raise UserError(f"cannot read the checkpoint {checkpoint}: {error}") from error
