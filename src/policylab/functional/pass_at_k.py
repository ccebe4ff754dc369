"""pass@k: the probability that at least one of ``k`` completions of a prompt passes.

Axes: ``B`` prompts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pass_at_k(passed: Int[Tensor, " B"], n: int, k: int) -> Float[Tensor, " B"]:
    """Unbiased estimate of pass@k of each prompt, from ``n`` completions of which ``passed`` passed.

    ``1 - C(n - c, k) / C(n, k)`` with ``c = passed``, as the product over ``i`` from ``n - c + 1`` to ``n`` of
    ``1 - k / i``, which is 0 if fewer than ``k`` completions failed. "Evaluating Large Language Models Trained on
    Code", Chen et al. 2021, arXiv:2107.03374, equation 1.

    Args:
        n: at least ``k``.
    """
    factors = 1 - k / torch.arange(n, 0, -1, dtype=torch.double, device=passed.device)
    failing = torch.cat([torch.ones_like(factors[:1]), factors.cumprod(0)])  # by the number that passed
    return 1 - failing[passed]


def ks(n: int) -> list[int]:
    """The reported ``k`` for ``n`` completions of a prompt: powers of two, and ``n``.

    >>> ks(1), ks(8), ks(10)
    ([1], [1, 2, 4, 8], [1, 2, 4, 8, 10])
    """
    return sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})
