"""The KL axis: where the distance to the reference counts, how it is estimated, what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.errors import UserError, demand
from policylab.functional.kl import SAMPLED
from policylab.functional.masks import last_position
from policylab.rollouts.types import Evaluation, Rollout


@runtime_checkable
class Controller(Protocol):
    """Chooses the coefficient of the next iteration from the KL of this one."""

    initial: float

    def next(self, coefficient: float, kl: float, sequences: int) -> float: ...


@dataclass(frozen=True)
class FixedCoefficient:
    """The coefficient stays what it is."""

    initial: float

    def __post_init__(self) -> None:
        demand("algo.kl.controller.initial", self.initial, 0)

    def next(self, coefficient: float, kl: float, sequences: int) -> float:
        return coefficient


@dataclass(frozen=True)
class AdaptiveCoefficient:
    """Proportional control in log-space: "Fine-Tuning Language Models from Human Preferences",
    arXiv:1909.08593, section 2.2.

    Args:
        initial: first coefficient.
        target: KL to hold, in nats a sequence.
        horizon: sequences over which an error of 100 % multiplies the coefficient by about e^0.2.
    """

    initial: float
    target: float
    horizon: int

    def __post_init__(self) -> None:
        demand("algo.kl.controller.initial", self.initial, 0)
        demand("algo.kl.controller.target", self.target, 0, above=True)
        demand("algo.kl.controller.horizon", self.horizon, 1)

    def next(self, coefficient: float, kl: float, sequences: int) -> float:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coefficient * (1 + error * sequences / self.horizon)


#: Estimators whose gradient is that of the KL, by place. What is missing was enumerated and is refused:
#: in the reward, k2 and k3 have no gradient near the reference and ``exact`` depends on the state alone, so an
#: action never feels its own KL; in the loss, k1 has an expected gradient of zero.
VALID = {"none": ("k1", "k2", "k3", "exact"), "reward": ("k1",), "loss": ("k2", "k3", "exact")}


@dataclass(frozen=True)
class KLPenalty:
    """Distance to the reference policy.

    Args:
        place: ``reward`` subtracts it from each token's reward, which is unbiased; ``loss`` adds it to the loss,
            which leaves out that an action changes which states come later; ``none`` only measures it.
        estimator: k1, k2, k3 (see :mod:`policylab.functional.kl`) or ``exact`` over the vocabulary.
        controller: fixed or adaptive coefficient (reward or loss a nat).

    Raises:
        UserError: for a pair of place and estimator whose gradient is not that of the KL.
    """

    place: Literal["none", "reward", "loss"]
    estimator: Literal["k1", "k2", "k3", "exact"]
    controller: Controller

    def __post_init__(self) -> None:
        if self.estimator not in VALID[self.place]:
            raise UserError(
                f"algo.kl.estimator={self.estimator} in the {self.place} does not have the KL's gradient; "
                f"take {' or '.join(VALID[self.place])} there"
            )

    @property
    def needs_exact(self) -> bool:
        """Both whole distributions must be compared in every update."""
        return self.place == "loss" and self.estimator == "exact"

    def of_rollout(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Per-token KL of the sampling policy; zero where no action was taken."""
        return self._sampled(rollout.logprobs, rollout)

    def of_evaluation(self, evaluation: Evaluation, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Per-token KL of the current policy, with gradient; zero where no action was taken."""
        if self.estimator == "exact":
            assert evaluation.exact_kl is not None
            return evaluation.exact_kl
        return self._sampled(evaluation.logprobs, rollout)

    def _sampled(self, logprobs: Float[Tensor, "B T"], rollout: Rollout) -> Float[Tensor, "B T"]:
        assert rollout.ref_logprobs is not None
        estimate = SAMPLED[self.estimator](logprobs, rollout.ref_logprobs)
        return estimate.masked_fill(~rollout.action_mask, 0.0)


def shaped_token_rewards(rollout: Rollout, penalty: KLPenalty, coefficient: float) -> Float[Tensor, "B T"]:
    """The sequence's reward at its last action, minus the KL penalty of each action when it counts there.

    ``R_t = [t = last] r - beta KL_t``; arXiv:1909.08593, eq. 2.
    """
    assert rollout.rewards is not None
    rewards = torch.where(last_position(rollout.action_mask), rollout.rewards[:, None], 0.0)
    if penalty.place == "reward":
        rewards = rewards - coefficient * penalty.of_rollout(rollout)
    return rewards
