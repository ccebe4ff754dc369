"""The update axis: how a rollout becomes optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from policylab.errors import demand


@dataclass(frozen=True)
class MinibatchEpochs:
    """Several passes over the rollout in shuffled minibatches.

    Args:
        epochs: passes over the rollout.
        minibatches: optimizer steps a pass, each on an equal share of the rollout.
        kl_stop: ends the iteration's updates, before the step, once the policy is this far from the one that
            sampled (k3, nats a token); None never.
    """

    epochs: int
    minibatches: int
    kl_stop: float | None

    def __post_init__(self) -> None:
        demand("algo.update.kl_stop", self.kl_stop, 0, above=True)
