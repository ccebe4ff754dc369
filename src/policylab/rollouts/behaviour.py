"""Distributions that tokens are sampled from in place of the policy's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

#: The policy's log-distribution becomes the one that tokens are drawn from.
Behaviour = Callable[[Float[Tensor, "B V"]], Float[Tensor, "B V"]]


def greedy(logp: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """All probability on the likeliest token (of several, on the first)."""
    return torch.full_like(logp, float("-inf")).scatter(-1, logp.argmax(-1, keepdim=True), 0.0)


def epsilon_greedy(
    logp: Float[Tensor, "B V"], epsilon: float, others: Literal["uniform", "policy"]
) -> Float[Tensor, "B V"]:
    """``epsilon`` spread over all tokens, uniformly or by the policy's probabilities, the rest on the likeliest one."""
    spread = epsilon * (logp.exp() if others == "policy" else torch.full_like(logp, 1 / logp.shape[-1]))
    best = logp.argmax(-1, keepdim=True)
    return spread.scatter_add(-1, best, torch.full_like(logp[:, :1], 1 - epsilon)).log()
