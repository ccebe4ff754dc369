"""Skipped updates: when loss or gradient is not finite, the cause is reported and the batch is saved to a file.

A skipped update does not change weights, optimizer or checkpoints. Several in a row end the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from policylab.data.rollout import Rollout
from policylab.errors import named

log = logging.getLogger(__name__)

#: Number of batches that each process keeps in ``dumps/``; older ones are deleted.
KEPT = 8


class NotFinite(Exception):
    """A number computed by an update is NaN or infinite."""


def check_finite(value: Tensor | float, what: str) -> None:
    """Raises NotFinite for a NaN or an infinity, before it reaches the weights."""
    if not math.isfinite(value):
        raise NotFinite(f"the {what}")


@dataclass(frozen=True)
class Cause:
    """The quantity that was not finite. ``depth``: 0 weights, 1 batch, 2 update."""

    depth: int
    what: str

    @property
    def advice(self) -> str:
        """The usual remedy."""
        return (
            "an update before was too large: lower optim.lr",
            "look at the batch, and at the code that computes this",
            "lower optim.lr, or run with debug=nan to find the operation",
        )[self.depth]


#: Depths of a cause, the earliest first.
WEIGHTS, BATCH, UPDATE = range(3)


def cause_of(policy: nn.Module, rollout: Rollout | None, computed: Iterable[str]) -> Cause:
    """The earliest cause: the weights, the batch, or the update itself.

    Args:
        rollout: sequences of the update; None on a process that has none.
        computed: names of results of the update that are not finite.
    """
    if bad := [name for name, weight in policy.named_parameters() if not is_finite(weight)]:
        return Cause(WEIGHTS, f"the weights ({named(bad)})")
    if rollout is not None and (bad := not_finite_fields(rollout)):
        return Cause(BATCH, f"the rollout's {named(bad)}")
    if bad := list(computed):
        return Cause(UPDATE, named(bad))
    bad = [n for n, w in policy.named_parameters() if w.grad is not None and not is_finite(w.grad)]
    return Cause(UPDATE, f"the gradient ({named(bad) or 'its norm'})")


def is_finite(x: Tensor) -> bool:
    """Whether all elements are finite; of a sharded tensor, those of this process."""
    local = getattr(x, "to_local", lambda: x)()
    return bool(local.detach().isfinite().all())


def not_finite_fields(rollout: Rollout) -> list[str]:
    """Names of fields with a value that is not finite; in fields by position, only actions count."""
    bad = []
    for field in fields(rollout):
        value = getattr(rollout, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            counts = value.shape == rollout.action_mask.shape
            if not is_finite(value[rollout.action_mask] if counts else value):
                bad.append(field.name)
    return bad


def dump(folder: Path, name: str, suffix: str, content: dict[str, Any], rollout: Rollout) -> None:
    """Writes a batch to a file, which ``torch.load(..., weights_only=True)`` reads as a dict.

    Args:
        suffix: end of the file's name, different for each process.
        content: other entries of the dict.
    """
    batch = {field.name: getattr(rollout.to("cpu"), field.name) for field in fields(rollout)}
    path = folder / f"{name}{suffix}.pt"
    try:
        folder.mkdir(exist_ok=True)
        torch.save({**content, "rollout": batch}, path)
        for old in sorted(folder.glob(f"*{suffix}.pt"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch raises some OSErrors as RuntimeErrors
        log.warning("could not keep the batch in %s: %s", path, error)
        path.unlink(missing_ok=True)
