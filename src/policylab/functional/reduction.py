"""From per-token losses to one number.

Each reduction is a sum divided by a denominator, which is first computed over the whole minibatch and all processes.
So the result does not depend on micro-batches.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from policylab.functional.masks import masked_sum


def token_sum(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], denominator: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Sum over all true positions, divided by ``denominator``.

    With the number of tokens it is the token mean; with the number of sequences times a constant the
    reduction of "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.2.
    """
    return masked_sum(x, mask).sum() / denominator


def sequence_mean_sum(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], denominator: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Sum over sequences of the mean over their true positions, divided by ``denominator``.

    With the number of sequences every sequence has the same weight, whatever its length ("DeepSeekMath",
    arXiv:2402.03300, eq. 3). A sequence without true positions adds nothing.
    """
    return (masked_sum(x, mask) / mask.sum(-1).clamp(min=1)).sum() / denominator
