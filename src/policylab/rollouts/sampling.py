"""Inverse-CDF sampling: a token from a log-distribution and a uniform number."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def inverse_cdf(logp: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first token at which the cumulative probability exceeds the uniform number in [0, 1).

    The sum is taken in float64, so that rounding moves a boundary by no more than the probabilities' own
    error. A token of probability zero is never drawn.

    Raises:
        FloatingPointError: when the log-distribution holds NaN.
    """
    cdf = logp.exp().cumsum(-1, dtype=torch.double)
    if not bool(cdf[:, -1].isfinite().all()):
        raise FloatingPointError("the policy's logits are not finite; lower optim.lr, or run with debug=nan")
    # Probabilities sum to 1 up to rounding; scaling by the sum keeps the draw inside the table.
    threshold = uniform.to(cdf)[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, threshold, right=True).squeeze(-1)
    last_possible = torch.searchsorted(cdf, cdf[:, -1:].contiguous(), right=False).squeeze(-1)
    return torch.minimum(tokens, last_possible)
