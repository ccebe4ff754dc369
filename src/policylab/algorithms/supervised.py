"""Supervised training, a choice of ``algo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Supervised:
    """Maximum likelihood on the task's completions.

    Args:
        name: names the run.
        loss_on: ``completion`` trains on the completion's tokens, ``full`` also on the prompt's (except the first,
            which has no context).
        batch_size: sequences an update, over all processes.
    """

    name: str
    loss_on: Literal["completion", "full"]
    batch_size: int
