"""Per-token losses whose gradient is the policy gradient. Masking and averaging happen elsewhere.

``log_ratio`` is ``log pi(a_t) - log pi_old(a_t)``, or its mean over a sequence, which turns PPO's loss into GSPO's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.functional.ratios import MAX_LOG_RATIO, probability_ratio


def logprob_loss(logprobs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``-A_t log pi(a_t)``.

    "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
    Williams 1992, eq. 11.
    """
    return -advantages * logprobs


def ratio_loss(log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """``-ratio A``, with the ratio of the current to the old policy.

    "Trust Region Policy Optimization", arXiv:1502.05477, eq. 14. At ratio 1 its gradient is that of
    :func:`logprob_loss`. It has no bound of its own and needs a trust region.
    """
    return -probability_ratio(log_ratio) * advantages


def clipped_ratio_loss(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Float[Tensor, "B T"]:
    """``-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)``, and at most ``dual_clip |A|`` where ``A < 0``.

    "Proximal Policy Optimization Algorithms", arXiv:1707.06347, eq. 7, with two separate bounds; "Mastering
    Complex Control in MOBA Games with Deep Reinforcement Learning", arXiv:1912.09729, eq. 5, for the dual
    clip. The minimum bounds the ratio on one side only, which the sign of ``A`` decides; the code
    clamps it on that side. At ratio 1 its gradient is that of :func:`logprob_loss`.
    """
    low, high = _bounds(advantages, clip_low, clip_high, dual_clip)
    return -probability_ratio(log_ratio).clamp(low, high) * advantages


def clipped(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Float[Tensor, "B T"]:
    """1 where a bound of :func:`clipped_ratio_loss` removes a token's gradient, else 0."""
    low, high = _bounds(advantages, clip_low, clip_high, dual_clip)
    ratio = probability_ratio(log_ratio)
    outside = (ratio < low) | (ratio > high) | (log_ratio > MAX_LOG_RATIO)
    return (outside & (advantages != 0)).to(log_ratio.dtype)


def _bounds(
    advantages: Float[Tensor, "B T"], clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Bounds between which the ratio of each token has a gradient."""
    good = advantages > 0
    low = torch.where(good, 0.0, torch.full_like(advantages, 1 - clip_low))
    high = torch.full_like(advantages, torch.inf if dual_clip is None else dual_clip)
    return low, high.masked_fill(good, 1 + clip_high)


def weighted_logprob_loss(
    logprobs: Float[Tensor, "B T"],
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float | None,
    clip_high: float,
) -> Float[Tensor, "B T"]:
    """``-w A log pi`` with the constant ``w = clip(ratio, 1 - clip_low, 1 + clip_high)``.

    CISPO: "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv:2506.13585, eq. 4
    and 5. No gradient flows through ``w``, so every token keeps its gradient, even at a bound. Without bounds its
    gradient is that of :func:`ratio_loss`. ``clip_low`` None: no lower bound.
    """
    weight = probability_ratio(log_ratio).clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    return -weight.detach() * advantages * logprobs


def at_bound(
    log_ratio: Float[Tensor, "B T"], clip_low: float | None, clip_high: float
) -> Float[Tensor, "B T"]:
    """1 where the weight of :func:`weighted_logprob_loss` was cut, else 0."""
    ratio = probability_ratio(log_ratio)
    low = 0.0 if clip_low is None else 1 - clip_low
    return ((ratio < low) | (ratio > 1 + clip_high)).to(log_ratio.dtype)


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    clip: float | None,
) -> Float[Tensor, "B T"]:
    """``(V - R)^2 / 2``; with ``clip``, the larger of it and the loss of V clipped to within ``clip`` of the old value.

    The clipped form is that of OpenAI's PPO code ("Implementation Matters in Deep Policy Gradients",
    arXiv:2005.12729, section 3).
    """
    loss = (values - returns) ** 2
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (held - returns) ** 2)
    return 0.5 * loss
