"""Inverse-CDF sampling: a token from a distribution and a uniform number.

The cumulative sum is computed in two steps, over blocks of the vocabulary and then within one block. For 50,000
tokens that is one pass over the table instead of several, and only the sums are in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Tokens of a block.
BLOCK = 256


def draw(
    logits: Float[Tensor, "B V"], temperature: float, uniform: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Draws a token for each row from ``softmax(logits / temperature)``, with its log-prob.

    It is the first token at which the cumulative probability exceeds the uniform number in [0, 1). A token of
    probability zero is never drawn. If logits are not finite, the log-prob is NaN.
    """
    logits = logits.float()
    logits = logits if temperature == 1 else logits / temperature  # no copy at 1
    top = logits.amax(-1, keepdim=True)
    rows, size = logits.shape
    weights = logits.new_empty(rows, -(-size // BLOCK) * BLOCK)
    weights[:, size:] = 0
    torch.sub(logits, top, out=weights[:, :size]).exp_()
    tokens, total = _first_above(weights.view(rows, -1, BLOCK), uniform.to(logits.device))
    tokens.clamp_(max=size - 1)  # a row of NaN would give an index beyond the vocabulary
    chosen = logits.gather(-1, tokens[:, None]) - top
    return tokens, chosen.squeeze(-1) - total.log().float()


def inverse_cdf(logp: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token that `draw` takes from a log-distribution.

    Raises:
        FloatingPointError: when the log-distribution holds NaN.
    """
    tokens, logprobs = draw(logp, 1.0, uniform)
    check_finite(logprobs)
    return tokens


def check_finite(logprobs: Float[Tensor, "*B"]) -> None:
    """Raises FloatingPointError if the log-prob of a drawn token is not finite, because the logits were not."""
    if not bool(logprobs.isfinite().all()):
        raise FloatingPointError("the policy's logits are not finite; lower optim.lr, or run with debug=nan")


def _first_above(
    weights: Float[Tensor, "B N M"], uniform: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Index, counted over both axes, at which the cumulative share exceeds the uniform number; and the sum."""
    sums = weights.sum(-1)
    cdf = _running_sums(sums)
    total = cdf[:, -1]
    threshold = _below(uniform.double() * total, total)
    block = _search(cdf, threshold)
    within = weights.gather(1, block[..., None].expand(-1, 1, weights.shape[-1])).squeeze(1)
    own = _running_sums(within)
    # the block's own sum may differ from the cumulative one by rounding
    rest = threshold - (cdf.gather(-1, block) - sums.gather(-1, block)).squeeze(-1)
    token = block * weights.shape[-1] + _search(own, _below(rest.clamp(min=0), own[:, -1]))
    return token.squeeze(-1), total


def _running_sums(x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Running sums of each row, in float64.

    CUDA's scan is not deterministic. If deterministic algorithms are required, uses a product with a triangle of ones.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return by_triangle(x)
    return x.cumsum(-1, dtype=torch.double)


def by_triangle(x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Running sums as one product."""
    n = x.shape[-1]
    return x.double() @ torch.ones(n, n, dtype=torch.double, device=x.device).triu()


def _below(x: Float[Tensor, " B"], bound: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """``x``, or the number next below the bound where ``x`` reaches it."""
    return torch.minimum(x, bound.nextafter(torch.zeros_like(bound)))


def _search(cdf: Float[Tensor, "B N"], threshold: Float[Tensor, " B"]) -> Int[Tensor, "B 1"]:
    """The first index at which the cumulative sum exceeds a threshold below its end; any index if it is NaN."""
    found = torch.searchsorted(cdf, threshold[:, None], right=True)
    return found.clamp_(max=cdf.shape[1] - 1)
