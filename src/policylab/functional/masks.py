"""Masks, masked sums and moments. The mask is a required argument, so that it cannot be forgotten."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: Sums a tensor over all processes; the identity on a single one.
AllSum = Callable[[Tensor], Tensor]


def length_mask(lengths: Int[Tensor, " B"], width: int) -> Bool[Tensor, "B T"]:
    """True at the first ``lengths[b]`` of ``width`` positions."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked_sum(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Sum over the positions of each sequence where ``mask`` is true. Other values, even NaN, are ignored."""
    return x.masked_fill(~mask, 0.0).sum(-1)


def last_position(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at the last true position of each row; nowhere in a row without one."""
    after = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (after == 1)


def masked_moments(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], all_sum: AllSum
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and population variance over all true positions of all processes; zeros when there are none.

    Two passes (mean first), because the one-pass formula cancels when the mean is large.
    """
    count = all_sum(mask.sum().to(x.dtype)).clamp(min=1)
    mean = all_sum(masked_sum(x, mask).sum()) / count
    variance = all_sum(masked_sum((x - mean) ** 2, mask).sum()) / count
    return mean, variance


def whiten(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], all_sum: AllSum, eps: float = 1e-8
) -> Float[Tensor, "B T"]:
    """Zero mean and unit variance over the true positions; zero elsewhere.

    A batch without variance (all values equal) gives zeros, never NaN.
    """
    mean, variance = masked_moments(x, mask, all_sum)
    return ((x - mean) * torch.rsqrt(variance + eps)).masked_fill(~mask, 0.0)
