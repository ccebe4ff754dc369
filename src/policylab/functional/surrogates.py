"""Per-token losses whose gradient is the policy gradient. Masking and averaging happen elsewhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def logprob_loss(logprobs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``-A_t log pi(a_t)``.

    "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
    Williams 1992, eq. 11.
    """
    return -advantages * logprobs


def clipped_ratio_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "B T"]:
    """``-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)``.

    "Proximal Policy Optimization Algorithms", arXiv:1707.06347, eq. 7, with the two bounds apart. At
    ratio 1 its gradient is that of :func:`logprob_loss`.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "B T"]:
    """1 where the bound of :func:`clipped_ratio_loss` is active (the token has no gradient), else 0."""
    ratio = (logprobs - old_logprobs).exp()
    above = (ratio > 1 + clip_high) & (advantages > 0)
    below = (ratio < 1 - clip_low) & (advantages < 0)
    return (above | below).to(logprobs.dtype)


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    clip: float | None,
) -> Float[Tensor, "B T"]:
    """``(V - R)^2 / 2``; with ``clip``, the larger of it and the loss of V held within ``clip`` of the old value.

    The clipped form is that of OpenAI's PPO code ("Implementation Matters in Deep Policy Gradients",
    arXiv:2005.12729, section 3).
    """
    loss = (values - returns) ** 2
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (held - returns) ** 2)
    return 0.5 * loss
