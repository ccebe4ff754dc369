"""The folder of a model. Does not import torch, so that a wrong folder is refused before slow imports."""

from __future__ import annotations

from pathlib import Path

from policylab.errors import UserError


def check_folder(path: str | Path) -> Path:
    """The folder that ``model.path`` names.

    Raises:
        UserError: when it does not exist, or is a file.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(
            f"model.path={path} is a file; give the folder that holds config.json and the weights"
        )
    if not folder.is_dir():
        raise UserError(f"model.path={path}: there is no such folder (looked in {Path.cwd()})")
    return folder
