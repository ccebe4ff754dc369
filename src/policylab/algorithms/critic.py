"""The critic: a value head whose estimates serve as baseline."""

from __future__ import annotations

from dataclasses import dataclass

from policylab.errors import demand


@dataclass(frozen=True)
class Critic:
    """A linear value head on the policy's own trunk.

    Args:
        coef: weight of the value loss beside the policy's.
        clip: largest move of a value from its old one in an iteration; None does not clip.
    """

    coef: float
    clip: float | None

    def __post_init__(self) -> None:
        demand("algo.critic.coef", self.coef, 0)
        demand("algo.critic.clip", self.clip, 0, above=True)
