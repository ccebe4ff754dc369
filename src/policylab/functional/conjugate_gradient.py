"""Conjugate gradients: solve a linear system from products of its matrix with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Exponent of the diagonal: "Deep learning via Hessian-free optimization", Martens 2010, section 4.7.
PRECONDITIONER_POWER = 0.75


@dataclass(frozen=True)
class Solution:
    """The result."""

    x: Float[Tensor, " n"]
    product: Float[Tensor, " n"]  #: ``F x``, without damping; a by-product of the iteration
    damping: float  #: what was added to the diagonal
    residual: float  #: ``|(F + damping) x - b| / |b|``; 0 when ``b`` is zero
    iterations: int


def conjugate_gradient(
    product: Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]],
    b: Float[Tensor, " n"],
    *,
    damping: float,
    diagonal: Float[Tensor, " n"] | None,
    iterations: int,
    tolerance: float,
) -> Solution:
    """Solves ``(F + lambda I) x = b`` for a symmetric, positive semi-definite ``F``, starting at ``x = 0``.

    ``lambda = damping (b F b) / (b b)``: a share of the curvature along ``b``, so that the same number means the same
    for a model of any size and any number of tokens. "Methods of Conjugate Gradients for Solving Linear Systems",
    Hestenes and Stiefel 1952, section 3; damping as in "Deep learning via Hessian-free optimization", Martens 2010,
    section 4.1.

    Args:
        product: ``v -> F v``; called once an iteration, and once more with a preconditioner.
        diagonal: an estimate of ``F``'s diagonal, never negative; ``(diagonal + lambda)^0.75`` preconditions. It
            changes how fast the iteration converges, not the solution. None: no preconditioner.
        iterations: most iterations.
        tolerance: relative residual at which it stops.
    """
    x, fx = torch.zeros_like(b), torch.zeros_like(b)
    norm = _dot(b, b) ** 0.5
    if norm == 0:
        return Solution(x, fx, 0.0, 0.0, 0)
    curved = product(b)
    shift = damping * max(_dot(b, curved), 0.0) / norm**2
    inverse = (
        None if diagonal is None else (diagonal + shift).clamp(min=_tiny(diagonal)) ** -PRECONDITIONER_POWER
    )

    residual = b.clone()
    direction = b if inverse is None else inverse * b
    slope = _dot(residual, direction)
    done = 0
    while done < iterations and _dot(residual, residual) ** 0.5 > tolerance * norm:
        if done or inverse is not None:
            curved = product(direction)
        curvature = _dot(direction, curved) + shift * _dot(direction, direction)
        # rounding has made F indefinite, or b lies where F is zero; a NaN shows in the residual
        if curvature <= 0:
            break
        size = slope / curvature
        x += size * direction
        fx += size * curved
        residual -= size * (curved + shift * direction)
        done += 1
        scaled = residual if inverse is None else inverse * residual
        slope, before = _dot(residual, scaled), slope
        direction = scaled + (slope / before) * direction
    return Solution(x, fx, shift, _dot(residual, residual) ** 0.5 / norm, done)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def _tiny(diagonal: Tensor) -> float:
    """A lower bound of the diagonal, so that weights without curvature (tokens that never occur) get finite steps."""
    return max(1e-6 * float(diagonal.mean()), torch.finfo(diagonal.dtype).tiny)
