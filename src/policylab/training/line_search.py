"""How far a trust region's step may go: loss and KL of other weights on the rollout, and the search along the step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.algorithms import Algorithm, LossTerms, TrustRegion
from policylab.data.rollout import Rollout
from policylab.functional import kl
from policylab.functional.logprobs import token_logprobs
from policylab.functional.masks import masked_sum
from policylab.functional.ratios import probability_ratio
from policylab.training.fisher import Actor
from policylab.training.natural_step import Step
from policylab.training.sampler import Sampler
from policylab.training.skipping import check_finite


@dataclass(frozen=True)
class Outcome:
    """Loss and KL of a policy on the rollout that the old policy sampled."""

    loss: float
    kl: float = 0.0  #: KL(old | this policy) over the vocabulary, in nats per token
    kl_sampled: float = 0.0  #: the same by k3 on the sampled tokens
    clipped: float = 0.0  #: fraction of tokens that the surrogate clips
    ratio_max: float = 1.0


class Objective:
    """The policy's loss on a rollout, without the critic's, as a function of its weights; over all processes.

    Args:
        rollout: its action mask holds the actions to train on.

    Attributes:
        actions: number of actions, of all processes.
    """

    def __init__(self, algorithm: Algorithm, sampler: Sampler, actor: Actor, rollout: Rollout) -> None:
        self.algorithm = algorithm
        self.sampler = sampler
        self.actor = actor
        self.runtime = sampler.runtime
        mask = rollout.action_mask
        self.actions = int(self.runtime.all_sum(mask.sum()))
        denominator = self.runtime.all_sum(algorithm.reduction.denominator(mask))
        self.denominator = torch.where(denominator > 0, denominator, 1.0)  # an empty sum is zero, not NaN
        self.pieces = sampler.passes.pieces(rollout, mask.any(-1).nonzero().squeeze(-1))

    def gradient(self) -> tuple[float, Float[Tensor, " n"]]:
        """The loss and its gradient at the present weights.

        Raises:
            NotFinite: when they are NaN or infinite.
        """
        actor, loss = self.actor, torch.zeros((), device=self.runtime.device)
        gradient = actor.flat([None] * len(actor.parameters))
        for piece in self.pieces:
            share, terms = self._loss(piece, actor.log_distributions(piece))
            gradient += actor.gradient(share)
            loss += share.detach()
            self.sampler.recorder.add("train/entropy", terms.entropy, piece.action_mask)
        gradient = self.runtime.all_sum(gradient)
        loss = self.runtime.all_sum(loss)
        check_finite(loss, "loss")
        check_finite(gradient.norm(), "gradient")
        return float(loss), gradient

    @torch.no_grad()
    def outcome(self, weights: Float[Tensor, " n"]) -> Outcome:
        """Loss and KL of other weights. Distributions are compared one micro-batch at a time."""
        sums = torch.zeros(4, device=self.runtime.device)
        ratio_max = torch.ones((), device=self.runtime.device)
        for piece in self.pieces:
            mask = piece.action_mask
            old = self.actor.log_distributions(piece)
            with self.actor.at(weights):
                new = self.actor.log_distributions(piece)
            loss, terms = self._loss(piece, new)
            logprobs = token_logprobs(new, piece.tokens[mask])
            before = piece.old_logprobs[mask]
            k3 = kl.k3(before[None], logprobs[None]).sum()
            sums += torch.stack([loss, kl.exact(old, new).sum(), k3, masked_sum(terms.clipped, mask).sum()])
            ratio_max = torch.maximum(ratio_max, probability_ratio(logprobs - before).max())
        total, distance, sampled, clipped = self.runtime.all_sum(sums).tolist()
        return Outcome(
            loss=total,
            kl=distance / self.actions,
            kl_sampled=sampled / self.actions,
            clipped=clipped / self.actions,
            ratio_max=float(self.runtime.all_max(ratio_max)),
        )

    def _loss(self, piece: Rollout, logp: Float[Tensor, "N V"]) -> tuple[Tensor, LossTerms]:
        """These rows' share of the loss of a policy with these distributions."""
        algorithm, sampler = self.algorithm, self.sampler
        evaluation = sampler.policy.evaluate_distributions(
            piece,
            logp,
            sampler.engine.temperature,
            values=piece.values,  # the critic is trained separately
            entropy_gradient=algorithm.entropy_coef != 0,
            reference=sampler.reference if algorithm.kl.exact_in_loss else None,
        )
        terms = dataclasses.replace(algorithm.loss_terms(piece, evaluation), value=None)
        per_token = algorithm.loss(terms, sampler.progress.kl_coef)
        return algorithm.reduction(per_token, piece.action_mask, self.denominator), terms


def search(objective: Objective, step: Step, loss: float, region: TrustRegion) -> tuple[float, int, Outcome]:
    """Moves the policy by the first step that lowers the loss within the trust region.

    Without a line search the full step is taken. When every step is rejected, the weights are restored exactly.

    Args:
        loss: that of the present weights.

    Returns:
        The fraction of the full step taken (0: none), how many were tried, and the outcome.

    Raises:
        NotFinite: when the KL after a step without line search is NaN or infinite.
    """
    if step.kl == 0:
        return 0.0, 0, Outcome(loss)
    scales = [1.0] if region.line_search is None else region.line_search.scales()
    old = objective.actor.flat(objective.actor.parameters)
    for tried, scale in enumerate(scales, start=1):
        new = old + scale * step.vector
        outcome = objective.outcome(new)
        if region.line_search is None:
            check_finite(outcome.kl, "KL after the natural gradient's step")
        if region.line_search is None or (outcome.loss < loss and outcome.kl <= region.max_kl):
            objective.actor.move_to(new)
            return scale, tried, outcome
    return 0.0, len(scales), Outcome(loss)
