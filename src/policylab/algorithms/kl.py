"""The KL axis: where the KL to the reference is penalized, how it is estimated, and its coefficient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from policylab.algorithms.reference import Reference
from policylab.data.rollout import Evaluation, Rollout
from policylab.errors import UserError, check_range
from policylab.functional.kl import SAMPLED, exact_in_reward


@runtime_checkable
class Controller(Protocol):
    """Chooses the coefficient of the next iteration from the KL of this one."""

    @property
    def initial(self) -> float: ...

    def next(self, coefficient: float, kl: float, sequences: int) -> float: ...


@dataclass(frozen=True)
class FixedCoefficient:
    """A constant coefficient."""

    initial: float

    def __post_init__(self) -> None:
        check_range("algo.kl.controller.initial", self.initial, 0)

    def next(self, coefficient: float, kl: float, sequences: int) -> float:
        return coefficient


@dataclass(frozen=True)
class AdaptiveCoefficient:
    """Proportional control in log-space: "Fine-Tuning Language Models from Human Preferences",
    arXiv:1909.08593, section 2.2.

    The paper's factor, ``1 + error n / horizon``, can be negative with a short horizon. This uses ``exp(error n /
    horizon)``, which is equal to first order.

    Args:
        initial: first coefficient.
        target: KL to hold, in nats a sequence.
        horizon: sequences over which an error of 20 % or more multiplies the coefficient by e^0.2. One iteration
            multiplies or divides it by e at most.
    """

    initial: float
    target: float
    horizon: int

    def __post_init__(self) -> None:
        check_range("algo.kl.controller.initial", self.initial, 0, above=True)
        check_range("algo.kl.controller.target", self.target, 0, above=True)
        check_range("algo.kl.controller.horizon", self.horizon, 1)

    def next(self, coefficient: float, kl: float, sequences: int) -> float:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return coefficient * math.exp(min(max(error * sequences / self.horizon, -1.0), 1.0))


@dataclass(frozen=True)
class NoPenalty:
    """The KL to the reference is measured, but not penalized.

    Args:
        reference: None: no KL is measured, and no second copy of the weights is kept.
    """

    reference: Reference | None
    place: ClassVar[Literal["none"]] = "none"
    controller: ClassVar[Controller] = FixedCoefficient(0.0)
    exact_in_reward: ClassVar[bool] = False
    exact_in_loss: ClassVar[bool] = False


#: Estimators whose gradient is that of the KL, by place. The others are refused:
#: in the reward, k2 and k3 have no gradient near the reference; in the loss, k1 has an expected gradient of zero.
VALID = {"reward": ("k1", "exact"), "loss": ("k2", "k3", "exact")}


@dataclass(frozen=True)
class KLPenalty:
    """Distance to the reference policy.

    Args:
        place: ``reward`` subtracts it from each token's reward, which is unbiased; ``loss`` adds it to the loss,
            which ignores that an action changes later states.
        estimator: k1, k2, k3 (see :mod:`policylab.functional.kl`) or ``exact`` over the vocabulary.
        controller: fixed or adaptive coefficient (reward or loss a nat).
        reference: the policy that the distance is measured to.

    Raises:
        UserError: for a pair of place and estimator whose gradient is not that of the KL, or without reference.
    """

    place: Literal["reward", "loss"]
    estimator: Literal["k1", "k2", "k3", "exact"]
    controller: Controller
    reference: Reference | None

    def __post_init__(self) -> None:
        if self.estimator not in VALID[self.place]:
            raise UserError(
                f"algo.kl.estimator={self.estimator} in the {self.place} does not have the KL's gradient; "
                f"take {' or '.join(VALID[self.place])} there"
            )
        if self.reference is None:
            raise UserError(
                f"algo/kl penalizes the KL in the {self.place}, but algo/reference is none; "
                "take algo/reference=frozen or algo/kl=none"
            )

    @property
    def exact_in_reward(self) -> bool:
        """Both whole distributions must be compared once for each rollout."""
        return self.place == "reward" and self.estimator == "exact"

    @property
    def exact_in_loss(self) -> bool:
        """Both whole distributions must be compared in every update."""
        return self.place == "loss" and self.estimator == "exact"

    def of_rollout(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """KL penalty of each token, for the policy before the update; zero where no action was taken."""
        if self.estimator == "exact":
            assert rollout.exact_kl is not None
            return exact_in_reward(
                self._sampled("k1", rollout.old_logprobs, rollout), rollout.exact_kl, rollout.action_mask
            )
        return self._sampled(self.estimator, rollout.old_logprobs, rollout)

    def of_evaluation(self, evaluation: Evaluation, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Per-token KL of the current policy, with gradient; zero where no action was taken."""
        if self.estimator == "exact":
            assert evaluation.exact_kl is not None
            return evaluation.exact_kl
        return self._sampled(self.estimator, evaluation.logprobs, rollout)

    def _sampled(
        self, estimator: str, logprobs: Float[Tensor, "B T"], rollout: Rollout
    ) -> Float[Tensor, "B T"]:
        assert rollout.ref_logprobs is not None
        estimate = SAMPLED[estimator](logprobs, rollout.ref_logprobs)
        return estimate.masked_fill(~rollout.action_mask, 0.0)
