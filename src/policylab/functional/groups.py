"""Credit of whole sequences relative to their group. ``B`` rows, in any order; rows with equal ids form a group.

A row that is not ``present`` is ignored and gets zero. Rows are compared in pairs, which needs ``B x B`` of
memory (4 MB of booleans for 2,048 rows), and gives the same sum in the same order on every device. Values are
taken relative to the group's smallest, so that equal ones give exactly zero, without rounding errors.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: Added to a group's standard deviation. Far below any standard deviation that matters.
STD_EPS = 1e-6
#: Rewards that differ by less count as equal: the KL of an unchanged policy is zero only up to rounding, which must not
#: decide what is selected.
TIE = 1e-4


def leave_one_out(
    x: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], present: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """``x_i`` minus the mean of its group's other rows; zero for a row that is alone.

    "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
    arXiv:2402.14740, section 3.3. It is ``G / (G - 1)`` times :func:`group_centered`.
    """
    peers = _peers(group_ids, present)
    x, count = _above_lowest(x, peers), peers.sum(-1)
    others = (_sum(x, peers) - x) / (count - 1).clamp(min=1)
    return torch.where(present & (count > 1), x - others, 0.0)


def group_centered(
    x: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], present: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """``x_i`` minus the mean of its group, itself included.

    "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv:2503.20783, section 3.2.
    """
    peers = _peers(group_ids, present)
    x = _above_lowest(x, peers)
    return torch.where(present, x - _sum(x, peers) / peers.sum(-1).clamp(min=1), 0.0)


def group_normalized(
    x: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], present: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """``(x_i - mean) / (std + eps)`` with the sample standard deviation (divisor ``G - 1``) of its group.

    "DeepSeekMath", arXiv:2402.03300, section 4.1.2, which leaves open which standard deviation is meant. A
    group of equal values, or of one, gives zeros.
    """
    centered = group_centered(x, group_ids, present)
    peers = _peers(group_ids, present)
    variance = _sum(centered**2, peers) / (peers.sum(-1) - 1).clamp(min=1)
    return centered / (variance.sqrt() + STD_EPS)


def best_of_group(
    x: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], present: Bool[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """The size of the group for its largest value (of equal ones the first row), zero for the others.

    So the mean over all rows is the mean over the best of each group: "RAFT: Reward rAnked FineTuning",
    arXiv:2304.06767, algorithm 1. If all are equal, all get zero. Values that differ by less than :data:`TIE` count as
    equal.
    """
    peers = _peers(group_ids, present)
    above = _above_lowest(x, peers)
    highest = above.expand_as(peers).masked_fill(~peers, 0.0).amax(-1)
    is_best = present & (highest - above < TIE) & (highest >= TIE)
    first = (peers & is_best).int().argmax(-1)
    rows = torch.arange(len(x), device=x.device)
    return torch.where(is_best & (rows == first), peers.sum(-1).to(x.dtype), 0.0)


def _peers(group_ids: Int[Tensor, " B"], present: Bool[Tensor, " B"]) -> Bool[Tensor, "B B"]:
    """At row ``i``, true at the present rows of ``i``'s group, including ``i``."""
    return (group_ids[:, None] == group_ids) & present


def _sum(x: Float[Tensor, " B"], peers: Bool[Tensor, "B B"]) -> Float[Tensor, " B"]:
    """At each row, the sum over its group."""
    return x.expand_as(peers).masked_fill(~peers, 0.0).sum(-1)


def _above_lowest(x: Float[Tensor, " B"], peers: Bool[Tensor, "B B"]) -> Float[Tensor, " B"]:
    """Each value relative to the lowest of its group."""
    return x - x.expand_as(peers).masked_fill(~peers, torch.inf).amin(-1)
