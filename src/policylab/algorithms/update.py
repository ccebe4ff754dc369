"""The update axis: the optimizer steps on a rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policylab.algorithms.trust_region import TrustRegion
from policylab.errors import UserError, check_range


@dataclass(frozen=True)
class SingleStep:
    """One optimizer step on the whole rollout: the ratio is 1, whatever the surrogate."""

    epochs: ClassVar[int] = 1
    minibatches: ClassVar[int] = 1
    kl_stop: ClassVar[None] = None
    reestimate: ClassVar[bool] = False
    gives_old_logprobs: ClassVar[bool] = True  #: its own forward passes give the log-probs before the update


@dataclass(frozen=True)
class MinibatchEpochs:
    """Several passes over the rollout in shuffled minibatches.

    Args:
        epochs: passes over the rollout.
        minibatches: optimizer steps a pass, each on an equal share of the rollout.
        kl_stop: ends the iteration's updates, before the step, once the policy's KL to the sampling policy exceeds
            this (k3, nats a token); None: never.
        reestimate: before each pass except the first, recomputes the advantages with the current critic ("What Matters
            In On-Policy Reinforcement Learning?", arXiv:2006.05990, section 3.5); one more forward pass each.
    """

    epochs: int
    minibatches: int
    kl_stop: float | None
    reestimate: bool

    def __post_init__(self) -> None:
        check_range("algo.update.epochs", self.epochs, 1)
        check_range("algo.update.minibatches", self.minibatches, 1)
        check_range("algo.update.kl_stop", self.kl_stop, 0, above=True)
        if self.kl_stop is not None and self.gives_old_logprobs:
            raise UserError(
                f"algo.update.kl_stop={self.kl_stop} ends an iteration after its first update at the earliest, and "
                "there is only one; take more epochs or minibatches, or null"
            )
        if self.reestimate and self.epochs == 1:
            raise UserError(
                "algo.update.reestimate=true estimates again before the second pass, but algo.update.epochs is 1; "
                "take more epochs or false"
            )

    @property
    def gives_old_logprobs(self) -> bool:
        """True for a single step: its forward passes are of the sampling policy."""
        return self.epochs * self.minibatches == 1


Update = SingleStep | MinibatchEpochs | TrustRegion
