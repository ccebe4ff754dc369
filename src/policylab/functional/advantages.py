"""Returns and advantages on the ``[B, T]`` grid.

The mask is true where the policy acted. Other positions (padding, an environment's words) are skipped: the next action
is the next true position.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.functional.masks import AllSum, masked_moments


def discounted_returns(
    token_rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float
) -> Float[Tensor, "B T"]:
    """Return-to-go ``R_t = r_t + gamma R_{t+1}`` over the true positions; zero elsewhere.

    Sutton & Barto, "Reinforcement Learning" (2018), eq. 3.8 and 3.9, each episode ending with its sequence.
    """
    return gae(token_rewards, torch.zeros_like(token_rewards), mask, gamma, lam=1.0)


def gae(
    token_rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation; zero outside the mask.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, the value after the
    last action being zero. "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv:1506.02438, eq. 11, 12 and 16. ``lam = 1`` gives return minus value, ``lam = 0`` the TD residual.
    """
    advantages = torch.zeros_like(token_rewards)
    next_value = torch.zeros_like(token_rewards[:, 0])
    following = torch.zeros_like(next_value)
    for t in reversed(range(token_rewards.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        current = delta + gamma * lam * following
        following = torch.where(mask[:, t], current, following)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], current, 0.0)
    return advantages


def n_step(
    token_rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    n: int,
) -> Float[Tensor, "B T"]:
    """``A_t = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V_{t+n} - V_t``; zero outside the mask.

    Values and rewards after the last action are zero. "Asynchronous Methods for Deep Reinforcement Learning",
    arXiv:1602.01783, section 4. ``n = 1`` is the TD residual; ``n`` of the longest sequence or more gives
    return minus value.
    """
    width = mask.shape[1]
    advantages = -values
    for k in range(min(n, width)):
        advantages = advantages + gamma**k * actions_ahead(token_rewards, mask, k)
    if n < width:
        advantages = advantages + gamma**n * actions_ahead(values, mask, n)
    return advantages.masked_fill(~mask, 0.0)


def actions_ahead(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], n: int) -> Float[Tensor, "B T"]:
    """At each true position, ``x`` of ``n`` true positions later; zero where there is none."""
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)  # true positions first, in their order
    packed = x.masked_fill(~mask, 0.0).gather(-1, order)
    ahead = torch.nn.functional.pad(packed[:, n:], (0, min(n, x.shape[1])))
    return torch.zeros_like(x).scatter(-1, order, ahead).masked_fill(~mask, 0.0)


def subtract_batch_mean(
    returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], all_sum: AllSum
) -> Float[Tensor, "B T"]:
    """Return-to-go minus the mean, over the sequences of all processes, of their whole return.

    The mean includes the sequence itself. With ``gamma = 1`` and a sum over tokens this only scales the expected
    gradient by ``(B - 1) / B``; otherwise there is a small bias. A sequence without
    actions is not counted. Zero outside the mask.
    """
    first = mask & (mask.cumsum(-1) == 1)
    total = all_sum(returns.masked_fill(~first, 0.0).sum())
    count = all_sum(first.sum().to(returns.dtype)).clamp(min=1)
    return (returns - total / count).masked_fill(~mask, 0.0)


def explained_variance(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], all_sum: AllSum
) -> Float[Tensor, ""]:
    """``1 - Var(returns - values) / Var(returns)`` over the true positions of all processes.

    1 is a perfect critic; 0 is no better than a constant. Returns without variance give zero.
    """
    _, residual = masked_moments(returns - values, mask, all_sum)
    _, spread = masked_moments(returns, mask, all_sum)
    return torch.where(spread > 1e-12, 1 - residual / spread.clamp(min=1e-12), torch.zeros_like(spread))
