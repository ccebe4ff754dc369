"""The critic: a value head whose estimates serve as baseline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Critic:
    """A linear value head on the policy's own trunk.

    Args:
        coef: weight of the value loss beside the policy's.
        clip: largest move of a value from its old one in an iteration; None does not clip.
    """

    coef: float
    clip: float | None
