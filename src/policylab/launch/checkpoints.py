"""A run's checkpoint files: which of them are whole, and how far the run was."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from policylab.errors import UserError

log = logging.getLogger(__name__)

#: Under ``checkpoints/``: the newest state, and the one before it.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
#: Bytes that are checked at a time.
CHUNK = 2**22
#: What reading a damaged file may raise, and one that is not ours.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
    *(RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError),
)


def newest_whole_checkpoint(run_folder: Path) -> Path | None:
    """The newest state of a run that can be read; what is skipped is told.

    Returns:
        None for a run that was killed before it wrote its first.

    Raises:
        UserError: when there are files, and all are damaged.
    """
    damaged = list[str]()
    for name in (LAST, PREVIOUS):
        path = run_folder / "checkpoints" / name
        if not path.exists():
            continue
        if (why := damage(path)) is None:
            if damaged:
                log.warning("%s; going on from %s, the one before it", "; ".join(damaged), path)
            return path.resolve()
        damaged.append(f"{path} is damaged ({why})")
    if damaged:
        raise UserError(
            f"{'; '.join(damaged)}; name another file, such as resume={run_folder}/checkpoints/best.ckpt, or start a "
            "new run"
        )
    return None


def demand_whole(checkpoint: Path) -> Path:
    """A file that the user has named.

    Raises:
        UserError: when it is damaged.
    """
    if why := damage(checkpoint):
        raise UserError(f"the checkpoint {checkpoint} is damaged ({why}); take another one")
    return checkpoint


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint file; None when it is whole.

    It is a zip archive, which holds a CRC-32 of each tensor. Torch does not look at them; this does, at about 1 GB/s.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            for record in archive.infolist():
                if (
                    record.external_attr
                ):  # torch writes none, and would read a tensor marked as a folder as nothing
                    raise zipfile.BadZipFile(f"{record.filename} has attributes")
                with archive.open(record) as file:
                    while file.read(CHUNK):
                        pass
        read(checkpoint)  # torch wants more of the archive's directory to be right
    except UNREADABLE as error:
        size = checkpoint.stat().st_size if checkpoint.exists() else 0
        return f"{size} bytes; {error or type(error).__name__}"
    return None


def read(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds; its tensors stay on disk until somebody looks at them."""
    import torch

    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return content


def become_newest(run_folder: Path, checkpoint: Path) -> None:
    """A run that goes on from an older state goes on from it again if it is killed before the next one is written.

    Otherwise it would then go on from a newer state than its records, which are cut back, and leave a gap in them.
    Call it before the records are cut.
    """
    for name in (LAST, PREVIOUS):
        path = run_folder / "checkpoints" / name
        if checkpoint.resolve() != path.resolve():
            link_atomically(checkpoint, path)


def link_atomically(source: Path, path: Path) -> None:
    """Gives a file a second name; nothing is copied, and a later rename onto the first name leaves it alone.

    Where the file system knows no second names, it is a copy.
    """
    if path.exists() and path.samefile(source):  # renaming one name of a file onto another leaves both
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
    """Iterations that were done when a checkpoint was written."""
    return int(checkpoint_state(checkpoint)["iteration"])


def checkpoint_state(checkpoint: Path) -> dict[str, Any]:
    """The part of a checkpoint that says how far the run was.

    Raises:
        UserError: when the file is damaged, or not one of ours.
    """
    try:
        state: dict[str, Any] = read(checkpoint)["policylab"]
        return {name: state[name] for name in ("iteration", "tokens_sampled")}
    except UNREADABLE as error:
        raise UserError(f"cannot read the checkpoint {checkpoint}: {error}") from error
