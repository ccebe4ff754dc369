"""The full step of a trust region: direction by conjugate gradients, length by the quadratic model of the KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from policylab.algorithms import TrustRegion
from policylab.data.rollout import Rollout
from policylab.functional.conjugate_gradient import conjugate_gradient
from policylab.training.fisher import GROUPS, Actor, FisherProducts, fisher_diagonal
from policylab.training.passes import Passes
from policylab.training.skipping import check_finite


@dataclass(frozen=True)
class Step:
    """The step to the boundary of the trust region."""

    vector: Float[Tensor, " n"]
    kl: float  #: predicted by the quadratic model, in nats per token; 0 for no step
    residual: float  #: relative residual of the conjugate gradients


class NaturalStep:
    """``sqrt(2 max_kl / s F s) s`` with ``(F + damping) s = -gradient``, the same on all processes.

    A subset of the sequences is enough for the direction, not for the length: the direction fits the tokens of the
    gradient, so the Fisher matrix of a few of them underestimates the KL on the rest.
    """

    def __init__(self, region: TrustRegion, passes: Passes) -> None:
        self.region = region
        self.passes = passes
        self.runtime = passes.runtime

    def __call__(self, actor: Actor, rollout: Rollout, gradient: Float[Tensor, " n"]) -> Step:
        """The step for a gradient of the loss; the action mask of ``rollout`` holds the actions to train on.

        Raises:
            NotFinite: when a number is NaN or infinite, before it reaches the weights.
        """
        region, runtime = self.region, self.runtime
        every, _ = self.rows(rollout, 1.0)
        some, group = self.rows(rollout, region.fisher_share)
        if not gradient.any():
            return Step(torch.zeros_like(gradient), 0.0, 0.0)
        diagonal = None
        if region.preconditioner == "diagonal":
            groups = [self.passes.pieces(rollout, some[group == i]) for i in range(GROUPS)]
            diagonal = fisher_diagonal(actor, groups, self.actions(rollout, some), runtime.all_sum)
        solution = conjugate_gradient(
            self.fisher(actor, rollout, some),
            -gradient,
            damping=region.damping,
            diagonal=diagonal,
            iterations=region.cg_iterations,
            tolerance=region.cg_tolerance,
        )
        check_finite(solution.residual, "residual of the conjugate gradients")
        if region.fisher_share == 1:
            curvature = float(solution.x @ solution.product)
        else:
            curvature = self.fisher(actor, rollout, every).curvature(solution.x)
        check_finite(curvature, "curvature along the natural gradient")
        if curvature <= 0:  # the distributions do not change in this direction
            return Step(torch.zeros_like(gradient), 0.0, solution.residual)
        scale = math.sqrt(2 * region.max_kl / curvature)
        return Step(scale * solution.x, region.max_kl, solution.residual)

    def fisher(self, actor: Actor, rollout: Rollout, rows: Int[Tensor, " N"]) -> FisherProducts:
        """Products with the Fisher matrix of these sequences of all processes."""
        actions = self.actions(rollout, rows)
        pieces = self.passes.pieces(rollout, rows)
        return FisherProducts(actor, pieces, actions, self.region.products, self.runtime.all_sum)

    def actions(self, rollout: Rollout, rows: Int[Tensor, " N"]) -> float:
        """Number of actions in these sequences of all processes."""
        return float(self.runtime.all_sum(rollout.action_mask[rows].sum()))

    def rows(self, rollout: Rollout, share: float) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """This process's part of a subset of the sequences to train on, and the group of each.

        The subset and its :data:`GROUPS` groups are spread evenly over the sequences of all processes, so they do not
        depend on the number of processes.
        """
        rank, rows = self.runtime.rank, rollout.action_mask.any(-1).nonzero().squeeze(-1)
        counts = torch.zeros(self.runtime.world_size, dtype=torch.long, device=rows.device)
        counts[rank] = len(rows)
        counts = self.runtime.all_sum(counts)
        total, before = int(counts.sum()), counts[:rank].sum()
        number = torch.arange(len(rows), device=rows.device) + before
        wanted = math.ceil(share * total)
        place = number * wanted // max(total, 1)
        taken = (number + 1) * wanted // max(total, 1) > place
        return rows[taken], place[taken] % GROUPS
