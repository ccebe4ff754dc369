"""Probability ratios between two policies, safe in float32."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from policylab.functional.masks import masked_sum

#: ``exp`` overflows in float32 at 88, and infinity times a gradient of zero is NaN. Ratios are
#: capped at e^20 (about 5e8), without gradient beyond.
MAX_LOG_RATIO = 20.0


def probability_ratio(log_ratio: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """``exp(log_ratio)``, finite whatever the argument."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def sequence_log_ratio(
    logprobs: Float[Tensor, "B T"], old_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Mean log-ratio of each sequence, at each of its true positions; zero elsewhere.

    ``log s_i = 1 / |y_i| sum_t log(pi(y_t) / pi_old(y_t))``. "Group Sequence Policy Optimization",
    arXiv:2507.18071, eq. 7. Values outside the mask, NaN included, change neither value nor gradient.
    """
    mean = masked_sum(logprobs - old_logprobs, mask) / mask.sum(-1).clamp(min=1)
    return mean[:, None].expand_as(mask).masked_fill(~mask, 0.0)
