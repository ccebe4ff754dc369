"""Why a model cannot be used, in one line."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from policylab.errors import UserError, named

#: First bytes of every Git LFS pointer.
LFS = b"version https://git-lfs"


def refusal(where: str | Path, error: Exception, attention: str | None = None) -> UserError:
    """Why a model cannot be loaded, in one line.

    Args:
        where: a folder or hub id.
        error: raised by the libraries.
        attention: the configured implementation.
    """
    folder, words = Path(where), str(error)
    files = sorted(file for file in folder.glob("*") if file.is_file())
    if pointers := [file.name for file in files if is_lfs_pointer(file)]:
        return UserError(
            f"{folder}: {named(pointers)}: a Git LFS pointer, not the file itself; run git lfs pull where it was "
            "cloned, or download the file"
        )
    if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError):
        weights = [file.name for file in files if file.suffix in (".safetensors", ".bin")]
        what = f"a file of weights ({named(weights)})" if weights else "a file of weights"
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        return UserError(
            f"{where}: {what} is damaged or holds more than tensors{reason}; copy or download it again"
        )
    if "trust_remote_code" in words:
        return UserError(
            f"{where} comes with its own Python code, which runs only if this command allows it: "
            "model.trust_remote_code=true (train.py), or trust_remote_code=true (evaluate.py, generate.py)"
        )
    if attention not in (None, "eager") and "does not support" in words and "ttention" in words:
        return UserError(
            f"{where}: {words.split(maxsplit=1)[0]} has no {attention} attention; take model.attn_implementation=eager"
        )
    kind = (
        ""
        if isinstance(error, OSError | ValueError | RuntimeError | ImportError)
        else f"{type(error).__name__}: "
    )
    return UserError(f"cannot load {where}: {kind}{first_line(error)}")


def check_whole(where: str | Path, report: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose weights do not match its config.

    Args:
        report: transformers' report of loading.

    Raises:
        UserError: naming weights that are missing or have another size.
    """
    if report["missing_keys"]:
        raise UserError(
            f"{where} lacks weights: {named(sorted(report['missing_keys']))}; take a whole checkpoint"
        )
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise UserError(
            f"{where}: weights of other sizes than in config.json, such as {name}: {list(found)} instead of "
            f"{list(wanted)} ({len(report['mismatched_keys'])} in all); take the config that belongs to the weights"
        )


@torch.no_grad()
def check_finite(model: torch.nn.Module, source: str) -> None:
    """Refuses weights that are not finite.

    Raises:
        UserError: naming them.
    """
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise UserError(
            f"{source}: the weights hold NaN or infinity in {named(bad)}; take an intact checkpoint, or a wider "
            "model.dtype if they are too large for this one"
        )


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is a Git LFS pointer: a placeholder for a file that was not downloaded."""
    with file.open("rb") as content:
        return content.read(len(LFS)) == LFS


def first_line(error: Exception) -> str:
    """The first line of an exception's message; with the second if the first is a heading."""
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    return first or type(error).__name__
