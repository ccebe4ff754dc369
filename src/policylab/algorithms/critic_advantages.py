"""Advantages with a critic, from its values at sampling time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.algorithms.advantage import Advantage, Estimate
from policylab.data.rollout import Rollout
from policylab.errors import check_range
from policylab.functional.advantages import gae, n_step
from policylab.functional.masks import AllSum, whiten
from policylab.functional.vtrace import vtrace


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
        check_range("algo.advantage.gamma", self.gamma, 0, 1)
        check_range("algo.advantage.lam", self.lam, 0, 1)

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        rewards, values = _inputs(rollout)
        mask = rollout.loss_mask
        advantages = gae(rewards, values, mask, self.gamma, self.lam)
        returns = torch.where(mask, advantages + values, 0.0)
        return Estimate(whiten(advantages, mask, all_sum) if self.whiten else advantages, returns)


@dataclass(frozen=True)
class NStep(Advantage):
    """``n`` rewards, then the critic: "Asynchronous Methods for Deep Reinforcement Learning", arXiv:1602.01783.

    Args:
        gamma: discount a token, in [0, 1].
        n: number of rewards, the action's own included, before the critic's value is used.
        whiten: scale to zero mean and unit variance over all actions.
    """

    gamma: float
    n: int
    whiten: bool
    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("algo.advantage.gamma", self.gamma, 0, 1)
        check_range("algo.advantage.n", self.n, 1)

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        rewards, values = _inputs(rollout)
        mask = rollout.loss_mask
        advantages = n_step(rewards, values, mask, self.gamma, self.n)
        returns = torch.where(mask, advantages + values, 0.0)
        return Estimate(whiten(advantages, mask, all_sum) if self.whiten else advantages, returns)


@dataclass(frozen=True)
class VTrace(Advantage):
    """V-trace, arXiv:1802.01561, for completions that another policy has sampled.

    Args:
        gamma: discount a token, in [0, 1].
        rho_clip: largest weight of a TD error; it decides which policy's values the targets converge to (at infinity
            the trained policy's, near zero the sampling policy's).
        c_clip: largest weight of later TD errors; a lower one has less variance and the same targets at convergence.
        whiten: scale to zero mean and unit variance over all actions.
    """

    gamma: float
    rho_clip: float
    c_clip: float
    whiten: bool
    needs_values: ClassVar[bool] = True
    needs_policy_logprobs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("algo.advantage.gamma", self.gamma, 0, 1)
        check_range("algo.advantage.rho_clip", self.rho_clip, 0, above=True)
        check_range("algo.advantage.c_clip", self.c_clip, 0, above=True)

    def __call__(self, rollout: Rollout, all_sum: AllSum) -> Estimate:
        assert rollout.policy_logprobs is not None
        rewards, values = _inputs(rollout)
        mask = rollout.loss_mask
        log_ratio = rollout.policy_logprobs - rollout.logprobs
        advantages, returns = vtrace(rewards, values, log_ratio, mask, self.gamma, self.rho_clip, self.c_clip)
        return Estimate(whiten(advantages, mask, all_sum) if self.whiten else advantages, returns)


def _inputs(rollout: Rollout) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    assert rollout.token_rewards is not None
    assert rollout.values is not None
    return rollout.token_rewards, rollout.values
