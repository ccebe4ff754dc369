"""The update axis, trust regions: one step to a bound on the KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from policylab.errors import UserError, check_range


@dataclass(frozen=True)
class LineSearch:
    """Backtracking: a step is tried, then shorter ones, until one is accepted.

    Args:
        max_steps: lengths that are tried; if none is accepted, the policy does not move.
        shrink: ratio of each length to the one before it.
    """

    max_steps: int
    shrink: float

    def __post_init__(self) -> None:
        check_range("algo.update.line_search.max_steps", self.max_steps, 1)
        check_range("algo.update.line_search.shrink", self.shrink, 0, 1, above=True)
        if self.shrink == 1:
            raise UserError(
                "algo.update.line_search.shrink is 1: every step would be as long as the first; take 0.8"
            )

    def scales(self) -> list[float]:
        """Shares of the full step, in the order in which they are tried."""
        return [self.shrink**i for i in range(self.max_steps)]


@dataclass(frozen=True)
class TrustRegion:
    """One step a rollout along the natural gradient, as long as the KL allows.

    ``max L(theta) such that mean KL(old | theta) <= max_kl``: "Trust Region Policy Optimization", arXiv:1502.05477,
    eq. 12 and appendix C. Without a line search it is the natural policy gradient ("A Natural Policy Gradient", Kakade
    2001) with the step length of TRPO.

    Args:
        max_kl: bound on KL(old | new) over the vocabulary, mean over the actions of all processes, nats a token.
        products: how products with the Fisher matrix are computed; both give the same. ``gauss_newton``: ``J' (diag p -
            p p') J v`` by forward-mode and reverse-mode differentiation; ``exact_kl``: differentiates the KL twice.
        fisher_share: share of the sequences that the Fisher matrix is averaged over (arXiv:1502.05477, appendix C.1).
        cg_iterations: largest number of iterations of conjugate gradients.
        cg_tolerance: relative residual that ends them.
        damping: added to the Fisher matrix's diagonal, as a share of the curvature along the gradient.
        preconditioner: ``diagonal`` scales the conjugate gradients by an estimate of the Fisher matrix's diagonal.
        line_search: backtracking; None: takes the full step without a check.
        critic_epochs: passes over the rollout that fit the critic after the policy's step, with ``optim``.
        critic_minibatches: steps of each such pass.
    """

    max_kl: float
    products: Literal["gauss_newton", "exact_kl"]
    fisher_share: float
    cg_iterations: int
    cg_tolerance: float
    damping: float
    preconditioner: Literal["none", "diagonal"]
    line_search: LineSearch | None
    critic_epochs: int
    critic_minibatches: int
    epochs: ClassVar[int] = 1
    minibatches: ClassVar[int] = 1
    gives_old_logprobs: ClassVar[bool] = False  #: the line search needs them once the weights have changed

    def __post_init__(self) -> None:
        check_range("algo.update.max_kl", self.max_kl, 0, above=True)
        check_range("algo.update.fisher_share", self.fisher_share, 0, 1, above=True)
        check_range("algo.update.cg_iterations", self.cg_iterations, 1)
        check_range("algo.update.cg_tolerance", self.cg_tolerance, 0, 1)
        check_range("algo.update.damping", self.damping, 0)
        check_range("algo.update.critic_epochs", self.critic_epochs, 1)
        check_range("algo.update.critic_minibatches", self.critic_minibatches, 1)
        for name, value, known in (
            ("products", self.products, ("gauss_newton", "exact_kl")),
            ("preconditioner", self.preconditioner, ("none", "diagonal")),
        ):
            if value not in known:
                raise UserError(f"algo.update.{name} is {value!r}; take {' or '.join(known)}")

    def check_shares(self, sequences: int) -> None:
        """Refuses critic minibatches of unequal size.

        Raises:
            UserError: with the numbers.
        """
        if sequences % self.critic_minibatches:
            raise UserError(
                f"{sequences} sequences cannot be cut into algo.update.critic_minibatches={self.critic_minibatches} "
                f"equal parts; take a divisor of {sequences}"
            )
