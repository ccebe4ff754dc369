"""Detects damaged checkpoint files."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

from policylab.errors import UserError

#: Bytes checked at a time.
CHUNK = 2**22
#: Exceptions of reading a damaged file, or one that is not a checkpoint.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
    *(RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError),
)
#: Errors of the machine, not of the file.
MACHINE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)


def read(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors mapped from the file."""
    import torch

    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return content


def check_undamaged(checkpoint: Path) -> Path:
    """The checkpoint itself.

    Raises:
        UserError: when it is damaged.
    """
    if why := damage(checkpoint):
        raise UserError(f"the checkpoint {checkpoint} is damaged ({why}); take another one")
    return checkpoint


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is undamaged.

    It is a zip archive with a CRC-32 of each tensor. Torch does not check them; this does, at about 1 GB/s.

    Raises:
        UserError: when an error of the machine prevents reading.
    """
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            for record in archive.infolist():
                if record.external_attr:  # torch writes none, and reads a tensor marked as a folder as empty
                    raise zipfile.BadZipFile(f"{record.filename} has attributes")
                with archive.open(record) as file:
                    while file.read(CHUNK):
                        pass
        read(checkpoint)  # torch is stricter about the archive's directory
    except UNREADABLE as error:
        if cause := machine_error(error):
            raise UserError(
                f"cannot read {checkpoint}: {cause}; the file itself may be intact: fix that and try again"
            ) from error
        size = checkpoint.stat().st_size if checkpoint.exists() else 0
        return f"{size} bytes; {error or type(error).__name__}"
    return None


def machine_error(error: Exception) -> str | None:
    """The error of the machine that made a read fail; None for other errors. Torch has it only as text."""
    causes = {code: os.strerror(code) for code in MACHINE_ERRORS}
    if isinstance(error, OSError) and error.errno in causes:
        return causes[error.errno]
    return next((cause for cause in causes.values() if cause in str(error)), None)
