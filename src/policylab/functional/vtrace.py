"""V-trace: n-step returns of one policy from the actions of another."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.functional.ratios import probability_ratio


def vtrace(
    token_rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    log_ratio: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    rho_clip: float,
    c_clip: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and value targets ``v_t``; both zero outside the mask.

    With ``rho_t = min(rho_clip, ratio_t)`` and ``c_t = min(c_clip, ratio_t)``::

        v_t = V_t + rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t (v_{t+1} - V_{t+1})
        A_t = rho_t (r_t + gamma v_{t+1} - V_t)

    the value after the last action being zero. "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
    Actor-Learner Architectures", arXiv:1802.01561, eq. 1 (in the form of remark 1) and section 4.2. Where the
    two policies are equal, ``A_t`` is the return minus the value. ``log_ratio`` is the log-prob under the trained
    policy minus that under the sampling policy.
    """
    ratio = probability_ratio(log_ratio)
    rho, c = ratio.clamp(max=rho_clip), ratio.clamp(max=c_clip)
    advantages, targets = torch.zeros_like(values), torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_target = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        here, reward, value = mask[:, t], token_rewards[:, t], values[:, t]
        advantage = rho[:, t] * (reward + gamma * next_target - value)
        delta = rho[:, t] * (reward + gamma * next_value - value)
        target = value + delta + gamma * c[:, t] * (next_target - next_value)
        advantages[:, t] = torch.where(here, advantage, 0.0)
        targets[:, t] = torch.where(here, target, 0.0)
        next_value = torch.where(here, value, next_value)
        next_target = torch.where(here, target, next_target)
    return advantages, targets
