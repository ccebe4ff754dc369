"""The advantage axis: from token rewards to what each action is credited with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from policylab.errors import demand
from policylab.functional.advantages import discounted_returns, gae, subtract_batch_mean
from policylab.functional.masks import AllSum, whiten
from policylab.rollouts.types import Rollout


@dataclass(frozen=True)
class Estimate:
    """Credit of each action, and what the critic should have said. Zero outside the action mask."""

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]  #: the critic's target


class Advantage(ABC):
    """A rollout with token rewards becomes an :class:`Estimate`.

    What a method needs beside the token rewards, it says in these:
    """

    needs_values: ClassVar[bool] = False  #: ``rollout.values``: a critic is built and trained
    needs_greedy: ClassVar[bool] = False  #: ``rollout.greedy_rewards``: one more completion a prompt
    needs_policy_logprobs: ClassVar[bool] = False  #: ``rollout.policy_logprobs``: one more forward pass
    min_group_size: ClassVar[int] = 1  #: completions of each prompt at least

    @abstractmethod
    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        """Credit of the actions in ``rollout.loss_mask``; a sequence outside it might as well not be there."""


@dataclass(frozen=True)
class ReturnToGo(Advantage):
    """Discounted return from each action on, with or without the batch mean as baseline.

    Args:
        gamma: discount a token, in [0, 1].
        baseline: what is subtracted.
        whiten: scale to zero mean and unit variance over all actions.
    """

    gamma: float
    baseline: Literal["none", "mean"]
    whiten: bool

    def __post_init__(self) -> None:
        demand("algo.advantage.gamma", self.gamma, 0, 1)

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        assert rollout.token_rewards is not None
        mask = rollout.loss_mask
        returns = discounted_returns(rollout.token_rewards, mask, self.gamma)
        advantages = subtract_batch_mean(returns, mask, all_sum) if self.baseline == "mean" else returns
        return Estimate(whiten(advantages, mask, all_sum) if self.whiten else advantages, returns)


@dataclass(frozen=True)
class GAE(Advantage):
    """Generalized advantage estimation, arXiv:1506.02438, with the critic's values at sampling time.

    Args:
        gamma: discount a token, in [0, 1].
        lam: 1 is return minus value (no bias from the critic), 0 the TD residual (least variance).
        whiten: scale to zero mean and unit variance over all actions.
    """

    gamma: float
    lam: float
    whiten: bool
    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        demand("algo.advantage.gamma", self.gamma, 0, 1)
        demand("algo.advantage.lam", self.lam, 0, 1)

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        assert rollout.token_rewards is not None
        assert rollout.values is not None
        mask = rollout.loss_mask
        advantages = gae(rollout.token_rewards, rollout.values, mask, self.gamma, self.lam)
        returns = advantages + rollout.values
        return Estimate(whiten(advantages, mask, all_sum) if self.whiten else advantages, returns)
