"""A run's checkpoint files: which of them are whole, and how far the run was."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from policylab.errors import UserError
from policylab.runs.words import word

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
#: Of the machine rather than of the file, which may well be whole.
ELSEWHERE = (
    *(errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)


def newest_whole_checkpoint(run_folder: Path) -> Path | None:
    """The newest state of a run that can be read; what is skipped is told.

    Returns:
        None for a run that was killed before it wrote its first.

    Raises:
        UserError: when there are files, and all are damaged; or when one cannot be looked at.
    """
    paths = [run_folder / "checkpoints" / name for name in (LAST, PREVIOUS)]
    faults = list[str]()
    for path in paths:
        why = damage(path) if path.exists() else ""
        if why is None:
            if faults:
                log.warning("%s; going on from %s, the one before it", "; ".join(faults), path)
            return path.resolve()
        faults.append(f"{path} is damaged ({why})" if why else f"{path} is missing")
    if any(path.exists() for path in paths):
        raise UserError(
            f"{'; '.join(faults)}; name another file, such as "
            f"{word('resume', run_folder / 'checkpoints' / 'best.ckpt')}, or start a new run"
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

    Raises:
        UserError: when it cannot be looked at, for a cause that lies elsewhere.
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
        if cause := cause_elsewhere(error):
            raise UserError(
                f"cannot read {checkpoint}: {cause}; this says nothing of the file, so mend it and try again"
            ) from error
        size = checkpoint.stat().st_size if checkpoint.exists() else 0
        return f"{size} bytes; {error or type(error).__name__}"
    return None


def cause_elsewhere(error: Exception) -> str | None:
    """What keeps a file from being read that may be whole; torch says it in words alone."""
    causes = {code: os.strerror(code) for code in ELSEWHERE}
    if isinstance(error, OSError) and error.errno in causes:
        return causes[error.errno]
    return next((cause for cause in causes.values() if cause in str(error)), None)


def read(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds; its tensors stay on disk until somebody looks at them."""
    import torch

    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return content


def demand_fit(
    module: Any,
    checkpoint: Path,
    advice: str = "give the model.* and optim.frozen_layers that the run was started with, or start a new run",
) -> None:
    """Refuses a state that is another model's, before anything of the run is touched.

    Args:
        module: as it was built.
        advice: what to do.

    Raises:
        UserError: naming a weight.
    """
    content = read(checkpoint)
    module.demand_origin(content["policylab"])
    given = module.given_weights()
    own = {name: shape_of(value) for name, value in module.state_dict().items() if name not in given}
    found = {name: shape_of(value) for name, value in content["state_dict"].items() if name not in given}
    if wrong := [name for name in own | found if own.get(name) != found.get(name)]:
        here, there = own.get(wrong[0], "missing"), found.get(wrong[0], "missing")
        raise UserError(
            f"{checkpoint} is of another model than this one: {wrong[0]} is {there} there and {here} here "
            f"({len(wrong)} weights differ); {advice}"
        )
    trained = [len(group["params"]) for group in module.configure_optimizers().param_groups]
    if (then := [len(g["params"]) for g in content["optimizer_states"][0]["param_groups"]]) != trained:
        raise UserError(f"{checkpoint} trained {sum(then)} weights, the command {sum(trained)}; {advice}")


def shape_of(value: Any) -> list[int]:
    """Of a weight; what else a state holds has none."""
    return list(getattr(value, "shape", ()))


def become_newest(run_folder: Path, checkpoint: Path) -> None:
    """A run that goes on from an older state goes on from it again if it is killed before the next one is written.

    Otherwise it would then go on from a newer state than its records, which are cut back, and leave a gap in them.
    Call it before the records are cut. The state before the last one stays what it is when the run goes on from the
    last; and a damaged last one is set aside, for whoever wants to look at it.
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
        content = read(checkpoint)
        if not isinstance(content, dict) or "policylab" not in content:
            raise UserError(
                f"{checkpoint} was not written by policylab; take one of a run's checkpoints/ folder"
            )
        return {name: content["policylab"][name] for name in ("iteration", "tokens_sampled")}
    except UNREADABLE as error:
        raise UserError(f"cannot read the checkpoint {checkpoint}: {error}") from error
