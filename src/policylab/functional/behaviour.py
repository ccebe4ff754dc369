"""Distributions that replace the policy's own when tokens are sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

#: Maps the policy's log-distribution to the one that tokens are drawn from.
Behaviour = Callable[[Float[Tensor, "B V"]], Float[Tensor, "B V"]]


def greedy(logp: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """All probability on the likeliest token, the first one if several are equal."""
    return torch.full_like(logp, float("-inf")).scatter(-1, logp.argmax(-1, keepdim=True), 0.0)


def epsilon_greedy(
    logp: Float[Tensor, "B V"], epsilon: float, others: Literal["uniform", "policy"]
) -> Float[Tensor, "B V"]:
    """Probability ``epsilon`` over all tokens, uniformly or as the policy's, and the rest on the likeliest one."""
    spread = epsilon * (logp.exp() if others == "policy" else torch.full_like(logp, 1 / logp.shape[-1]))
    best = logp.argmax(-1, keepdim=True)
    return spread.scatter_add(-1, best, torch.full_like(logp[:, :1], 1 - epsilon)).log()
