"""From logits to log-probs and entropies of sampled tokens.

``logp`` is a whole log-distribution, ``log_softmax`` of the logits; it is computed once for all quantities.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def completion_slice(prompt_width: int, width: int) -> slice:
    """The shift by one position; all code uses this function for it.
    In ``[prompt | completion]`` the logits that chose completion token ``t`` are at position
    ``prompt_width + t - 1``: those of the token before it.
    """
    return slice(prompt_width - 1, prompt_width + width - 1)


def log_distribution(logits: Float[Tensor, "*B V"], temperature: float) -> Float[Tensor, "*B V"]:
    """``log softmax(logits / temperature)`` in fp32, whatever the precision of the logits."""
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)  # no copy at 1


def token_logprobs(logp: Float[Tensor, "*B V"], tokens: Int[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """log p(token)."""
    return logp.gather(-1, tokens[..., None]).squeeze(-1)


def entropy(logp: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """``-sum_v p_v log p_v`` in nats. Tokens of probability zero (``logp`` -inf) add nothing."""
    return -(logp.exp() * logp.masked_fill(logp.isneginf(), 0.0)).sum(-1)
