"""Advantages without a critic: the reward minus a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.algorithms.advantage import Advantage, Estimate
from policylab.data.rollout import Rollout
from policylab.errors import UserError, check_range
from policylab.functional.advantages import discounted_returns, subtract_batch_mean
from policylab.functional.groups import best_of_group, group_centered, group_normalized, leave_one_out
from policylab.functional.masks import AllSum, masked_sum, whiten


@dataclass(frozen=True)
class ReturnToGo(Advantage):
    """Discounted return from each action on, with or without the batch mean as baseline.

    Args:
        gamma: discount a token, in [0, 1].
        baseline: what is subtracted.
        whiten: scale to zero mean and unit variance over all actions.

    Raises:
        UserError: for a baseline that whitening makes superfluous.
    """

    gamma: float
    baseline: Literal["none", "mean"]
    whiten: bool

    def __post_init__(self) -> None:
        check_range("algo.advantage.gamma", self.gamma, 0, 1)
        if self.whiten and self.baseline == "mean":
            raise UserError(
                "algo.advantage.baseline=mean changes nothing with algo.advantage.whiten=true, which subtracts the "
                "mean itself; take algo.advantage.baseline=none"
            )

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        returns, mask = _returns(rollout, self.gamma), rollout.loss_mask
        advantages = subtract_batch_mean(returns, mask, all_sum) if self.baseline == "mean" else returns
        return Estimate(whiten(advantages, mask, all_sum) if self.whiten else advantages, returns)


@dataclass(frozen=True)
class GreedyBaseline(Advantage):
    """Reward from each action on, minus the reward of the prompt's greedy completion.

    "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language
    Models", arXiv:2310.10505, algorithm 1. Unbiased, because the baseline does not depend on the sampled tokens.
    """

    needs_greedy: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        assert rollout.greedy_rewards is not None
        returns = _returns(rollout, 1.0)
        advantages = returns - rollout.greedy_rewards[:, None]
        return Estimate(advantages.masked_fill(~rollout.loss_mask, 0.0), returns)


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """RLOO: a sequence's whole reward minus the mean of its group's other sequences, the same at all its tokens.

    "Back to Basics", arXiv:2402.14740, section 3.3. Unbiased. A sequence that is alone in its group gets zero.
    """

    min_group_size: ClassVar[int] = 2
    per_sequence: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        return _of_sequences(rollout, leave_one_out)


@dataclass(frozen=True)
class GroupBaseline(Advantage):
    """GRPO: a sequence's whole reward minus the mean of its group, the same at all its tokens.

    "DeepSeekMath", arXiv:2402.03300, section 4.1.2. The mean includes the sequence itself, which shrinks the
    expected gradient by ``(G - 1) / G`` and changes nothing else.

    Args:
        normalize: divide by the group's sample standard deviation (plus 1e-6), which gives more weight to
            prompts whose rewards hardly differ; without it, the advantage of Dr. GRPO (arXiv:2503.20783).
    """

    normalize: bool
    min_group_size: ClassVar[int] = 2
    per_sequence: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        return _of_sequences(rollout, group_normalized if self.normalize else group_centered)


@dataclass(frozen=True)
class BestOfGroup(Advantage):
    """RAFT: learns only from the best sequence of each group, weighted by the size of the group.

    "RAFT: Reward rAnked FineTuning", arXiv:2304.06767, algorithm 1. With a mean over all sequences the loss is
    that of supervised training on the best ones. Of several best sequences it takes the first row; a group whose
    rewards are all equal gets zero.
    """

    min_group_size: ClassVar[int] = 2
    per_sequence: ClassVar[bool] = True

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        return _of_sequences(rollout, best_of_group)


def _returns(rollout: Rollout, gamma: float) -> Float[Tensor, "B T"]:
    assert rollout.token_rewards is not None
    return discounted_returns(rollout.token_rewards, rollout.loss_mask, gamma)


def _of_sequences(rollout: Rollout, credit: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Estimate:
    """The credit of each sequence's whole reward within its group, at each of its actions."""
    assert rollout.token_rewards is not None
    mask = rollout.loss_mask
    whole = masked_sum(rollout.token_rewards, mask)
    advantages = credit(whole, rollout.group_ids, mask.any(-1))
    return Estimate(torch.where(mask, advantages[:, None], 0.0), _returns(rollout, 1.0))
