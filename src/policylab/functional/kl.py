"""KL(policy | reference) at each token: three estimators from the sampled token, and the exact sum.

The samples come from the policy. With ``r = reference / policy`` at the sampled token (John Schulman,
"Approximating KL Divergence", 2020):

========  =======================  ==================================================
k1        ``-log r``               unbiased, large variance, may be negative
k2        ``(log r)^2 / 2``        biased, small variance; its gradient is unbiased
k3        ``r - 1 - log r``        unbiased, never negative
exact     ``sum_v p log(p / q)``   no variance; needs both distributions
========  =======================  ==================================================

"Unbiased" is about the value. The gradient depends on where the estimate is used: see
:class:`policylab.algorithms.kl.KLPenalty`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policylab.functional.ratios import MAX_LOG_RATIO


def k1(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``log p - log q``: unbiased, may be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``(log p - log q)^2 / 2``: biased, never negative."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``q / p - 1 - log(q / p)``: unbiased, never negative.

    Beyond a log-ratio of :data:`~policylab.functional.ratios.MAX_LOG_RATIO` it continues along its tangent, so that
    value and gradient stay finite and the gradient still pulls towards the reference.
    """
    log_ratio = ref_logprobs - logprobs
    near, beyond = log_ratio.clamp(max=MAX_LOG_RATIO), (log_ratio - MAX_LOG_RATIO).clamp(min=0.0)
    return torch.expm1(near) - near + math.expm1(MAX_LOG_RATIO) * beyond


def exact(logp: Float[Tensor, "*B V"], ref_logp: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """``sum_v p_v (log p_v - log q_v)`` over the whole vocabulary. Tokens with ``p_v = 0`` add nothing."""
    return (logp.exp() * (logp - ref_logp).masked_fill(logp.isneginf(), 0.0)).sum(-1)


def exact_in_reward(
    sampled: Float[Tensor, "B T"], exact_kl: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Penalty of each action: its own k1 and the *exact* KL of every later state; zero outside the mask.

    For its own state an action needs its own ``log p - log q``, because the exact KL is the same for all actions. For
    later states the expectation is enough. ``c_t = k1_t + exact_{t+1} - k1_{t+1}`` adds up to
    ``k1_t + sum_{s > t} exact_s``: the gradient of k1, without the noise of the later actions.

    Args:
        sampled: k1 of each action.
        exact_kl: KL over the vocabulary in each action's state, under the policy that sampled.
    """
    penalties = torch.zeros_like(sampled)
    following = torch.zeros_like(sampled[:, 0])
    for t in reversed(range(sampled.shape[1])):
        penalties[:, t] = torch.where(mask[:, t], sampled[:, t] + following, 0.0)
        following = torch.where(mask[:, t], exact_kl[:, t] - sampled[:, t], following)
    return penalties


#: The estimators that need only the sampled token's log-probs.
SAMPLED = {"k1": k1, "k2": k2, "k3": k3}
