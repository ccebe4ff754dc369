"""Trust-region updates: one step per rollout along the natural gradient, with a limit on the KL."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.algorithms import Algorithm, LossTerms, TrustRegion
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Rollout
from policylab.errors import UserError
from policylab.functional import kl
from policylab.functional.conjugate_gradient import conjugate_gradient
from policylab.functional.logprobs import token_logprobs
from policylab.functional.masks import masked_sum
from policylab.functional.ratios import probability_ratio
from policylab.training.fisher import GROUPS, Actor, FisherProducts, fisher_diagonal
from policylab.training.sampler import Sampler
from policylab.training.skipping import NotFinite
from policylab.training.stepper import Stepper
from policylab.training.updater import Updater


@dataclass(frozen=True)
class Step:
    """The full step: to the boundary of the trust region, by the quadratic model of the KL."""

    vector: Float[Tensor, " n"]
    kl: float  #: predicted by the quadratic model, in nats per token; 0 for no step
    residual: float  #: relative residual of the conjugate gradients


@dataclass(frozen=True)
class Outcome:
    """Loss and KL of a policy on the rollout that the old policy sampled."""

    loss: float
    kl: float  #: KL(old | this policy) over the vocabulary, in nats per token
    kl_sampled: float  #: the same by k3 on the sampled tokens
    clipped: float  #: fraction of tokens that the surrogate clips
    ratio_max: float


class TrustRegionUpdater(Updater[TrustRegion]):
    """Moves the policy by an algorithm whose update is a :class:`~policylab.algorithms.TrustRegion`.

    "Trust Region Policy Optimization", arXiv:1502.05477, appendix C. All sums over sequences are sums over processes,
    so every process takes the same step. Gradients come from ``autograd.grad``, which never runs the hooks by which
    data-parallel wrappers average them.

    Raises:
        UserError: for weights or attention that a trust region cannot work with.
    """

    def __init__(self, algorithm: Algorithm, plan: BatchPlan, sampler: Sampler, stepper: Stepper) -> None:
        super().__init__(algorithm, plan, sampler, stepper)
        if self.policy.dtype != torch.float32:
            raise UserError(
                f"algo.update=trust_region takes steps too small for {self.policy.dtype} weights; take "
                "model.dtype=float32, and hardware.precision=bf16-mixed for speed"
            )
        for policy in filter(None, (self.policy, sampler.reference)):
            policy.reader.make_differentiable()

    def update(self, rollout: Rollout) -> None:
        """Gradient -> natural direction -> step to the boundary -> line search -> critic."""
        self.ratio_max = torch.ones((), device=self.runtime.device)
        trained = rollout.replace(action_mask=rollout.loss_mask, kept=None)
        try:
            self.passes.retry_on_oom(lambda: self.move_policy(trained))
            self.stepper.skipped_in_a_row.pop("policy", None)
        except NotFinite as found:
            rows = torch.arange(len(rollout), device=self.runtime.device)
            self.stepper.skip_update(trained, rows, "policy", [str(found)])
        if self.algorithm.uses_critic:
            self.fit_critic(rollout)

    def move_policy(self, rollout: Rollout) -> None:
        """One step of the policy. The action mask of ``rollout`` holds the actions to train on."""
        actor = Actor(self.policy, tuple(self.policy.actor_parameters()), self.sampler.engine.temperature)
        mask = rollout.action_mask
        actions = int(self.runtime.all_sum(mask.sum()))
        denominator = self.runtime.all_sum(self.algorithm.reduction.denominator(mask))
        denominator = torch.where(denominator > 0, denominator, 1.0)  # an empty sum is zero, not NaN
        pieces = self.passes.pieces(rollout, mask.any(-1).nonzero().squeeze(-1))

        loss, gradient = self.surrogate_gradient(actor, pieces, denominator)
        step = self.natural_step(actor, rollout, gradient)
        scale, tried, outcome = self.search(actor, pieces, step, loss, denominator, actions)
        self.progress.tokens_trained += actions if scale else 0
        self.ratio_max = torch.full((), outcome.ratio_max, device=self.runtime.device)
        figures = {
            "train/loss": loss,
            "train/grad_norm": float(gradient.norm()),
            "train/kl_old": outcome.kl_sampled,
            "train/clip_fraction": outcome.clipped,
            "train/kl_predicted": scale**2 * step.kl,
            "train/kl_measured": outcome.kl,
            "train/cg_residual": step.residual,
            "train/search_steps": tried,
            "train/step_scale": scale,
            "train/surrogate_gain": loss - outcome.loss,
        }
        values = torch.tensor(list(figures.values()), device=self.runtime.device)
        for name, value in zip(figures, values, strict=True):
            self.recorder.add(name, value)

    # -- the direction ---------------------------------------------------------------------------------

    def surrogate_gradient(
        self, actor: Actor, pieces: Sequence[Rollout], denominator: Tensor
    ) -> tuple[float, Float[Tensor, " n"]]:
        """Loss and its gradient, over all processes; without the critic's loss."""
        loss = torch.zeros((), device=self.runtime.device)
        gradient = actor.flat([None] * len(actor.parameters))
        for piece in pieces:
            share, terms = self.policy_loss(piece, actor.log_distributions(piece), denominator)
            gradient += actor.gradient(share)
            loss += share.detach()
            self.recorder.add("train/entropy", terms.entropy, piece.action_mask)
        gradient = self.runtime.all_sum(gradient)
        loss = self.runtime.all_sum(loss)
        check_finite(loss, "loss")
        check_finite(gradient.norm(), "gradient")
        return float(loss), gradient

    def policy_loss(
        self, rollout: Rollout, logp: Float[Tensor, "N V"], denominator: Tensor
    ) -> tuple[Tensor, LossTerms]:
        """These rows' share of the loss of a policy with these distributions."""
        algorithm = self.algorithm
        evaluation = self.policy.evaluate_distributions(
            rollout,
            logp,
            self.sampler.engine.temperature,
            values=rollout.values,  # the critic is trained separately, below
            entropy_gradient=algorithm.entropy_coef != 0,
            reference=self.sampler.reference if algorithm.kl.exact_in_loss else None,
        )
        terms = dataclasses.replace(algorithm.loss_terms(rollout, evaluation), value=None)
        per_token = algorithm.loss(terms, self.progress.kl_coef)
        return algorithm.reduction(per_token, rollout.action_mask, denominator), terms

    def natural_step(self, actor: Actor, rollout: Rollout, gradient: Float[Tensor, " n"]) -> Step:
        """``sqrt(2 max_kl / s F s) s`` with ``(F + damping) s = -gradient``.

        A subset is enough for the direction, not for the length: the direction fits the tokens of the gradient, so
        the Fisher matrix of a few of them underestimates the KL on the rest.
        """
        region = self.settings
        every, _ = self.fisher_rows(rollout, 1.0)
        some, group = self.fisher_rows(rollout, region.fisher_share)
        if not gradient.any():
            return Step(torch.zeros_like(gradient), 0.0, 0.0)
        diagonal = None
        if region.preconditioner == "diagonal":
            groups = [self.passes.pieces(rollout, some[group == i]) for i in range(GROUPS)]
            diagonal = fisher_diagonal(actor, groups, self.actions(rollout, some), self.runtime.all_sum)
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

    def fisher(self, actor: Actor, rollout: Rollout, rows: Tensor) -> FisherProducts:
        """Products with the Fisher matrix of these sequences of all processes."""
        actions = self.actions(rollout, rows)
        return FisherProducts(
            actor, self.passes.pieces(rollout, rows), actions, self.settings.products, self.runtime.all_sum
        )

    def actions(self, rollout: Rollout, rows: Tensor) -> float:
        """Number of actions in these sequences of all processes."""
        return float(self.runtime.all_sum(rollout.action_mask[rows].sum()))

    def fisher_rows(self, rollout: Rollout, share: float) -> tuple[Tensor, Tensor]:
        """This process's part of a subset of the sequences to train on, and the group of each.

        The subset and its :data:`GROUPS` groups are spread evenly over the sequences of all processes, so they do not
        depend on the number of processes.
        """
        rows = rollout.action_mask.any(-1).nonzero().squeeze(-1)
        counts = torch.zeros(self.plan.processes, dtype=torch.long, device=rows.device)
        counts[self.runtime.rank] = len(rows)
        counts = self.runtime.all_sum(counts)
        total, before = int(counts.sum()), counts[: self.runtime.rank].sum()
        number = torch.arange(len(rows), device=rows.device) + before
        wanted = math.ceil(share * total)
        place = number * wanted // max(total, 1)
        taken = (number + 1) * wanted // max(total, 1) > place
        return rows[taken], place[taken] % GROUPS

    # -- the length ------------------------------------------------------------------------------------

    def search(
        self,
        actor: Actor,
        pieces: Sequence[Rollout],
        step: Step,
        loss: float,
        denominator: Tensor,
        actions: int,
    ) -> tuple[float, int, Outcome]:
        """Moves the policy by the first step that lowers the loss within the trust region.

        Without a line search the full step is taken. When every step is rejected, the weights are restored exactly.

        Returns:
            The fraction of the full step taken (0: none), how many were tried, and the outcome.
        """
        stay = Outcome(loss, 0.0, 0.0, 0.0, 1.0)
        if step.kl == 0:
            return 0.0, 0, stay
        search = self.settings.line_search
        scales = [1.0] if search is None else search.scales()
        old = actor.flat(actor.parameters)
        for tried, scale in enumerate(scales, start=1):
            new = old + scale * step.vector
            outcome = self.try_weights(actor, pieces, new, denominator, actions)
            if search is None:
                check_finite(outcome.kl, "KL after the natural gradient's step")
            if search is None or (outcome.loss < loss and outcome.kl <= self.settings.max_kl):
                actor.move_to(new)
                return scale, tried, outcome
        return 0.0, len(scales), stay

    @torch.no_grad()
    def try_weights(
        self,
        actor: Actor,
        pieces: Sequence[Rollout],
        weights: Float[Tensor, " n"],
        denominator: Tensor,
        actions: int,
    ) -> Outcome:
        """Outcome of other weights, over all processes. Distributions are compared one micro-batch at a time."""
        sums = torch.zeros(4, device=self.runtime.device)
        ratio_max = torch.ones((), device=self.runtime.device)
        for piece in pieces:
            mask = piece.action_mask
            old = actor.log_distributions(piece)
            with actor.at(weights):
                new = actor.log_distributions(piece)
            loss, terms = self.policy_loss(piece, new, denominator)
            logprobs = token_logprobs(new, piece.tokens[mask])
            before = piece.old_logprobs[mask]
            sums += torch.stack(
                [
                    loss,
                    kl.exact(old, new).sum(),
                    kl.k3(before[None], logprobs[None]).sum(),
                    masked_sum(terms.clipped, mask).sum(),
                ]
            )
            ratio_max = torch.maximum(ratio_max, probability_ratio(logprobs - before).max())
        total, distance, sampled, clipped = self.runtime.all_sum(sums).tolist()
        return Outcome(
            loss=total,
            kl=distance / actions,
            kl_sampled=sampled / actions,
            clipped=clipped / actions,
            ratio_max=float(self.runtime.all_max(ratio_max)),
        )

    # -- the critic ------------------------------------------------------------------------------------

    def fit_critic(self, rollout: Rollout) -> None:
        """Epochs of minibatches on the value loss alone; the policy does not move."""
        size = self.plan.sequences // self.settings.critic_minibatches
        critic_alone = {"critic_grad_norm": self.policy.critic_parameters()}
        for epoch in range(self.settings.critic_epochs):
            for rows in self.minibatches(rollout, epoch, size):
                if self.passes.retry_on_oom(functools.partial(self.critic_gradient, rollout, rows)):
                    self.stepper.apply_gradients(rollout, rows, "critic", critic_alone)

    def critic_gradient(self, rollout: Rollout, rows: Tensor) -> bool:
        """Computes the gradient of the critic's weights. False when no action is trained on."""
        algorithm, parameters = self.algorithm, self.policy.critic_parameters()
        assert algorithm.critic is not None
        denominator = self.runtime.all_sum(algorithm.reduction.denominator(rollout.loss_mask[rows]))
        if denominator == 0:
            return False
        gradients = [torch.zeros_like(p) for p in parameters]
        for piece in self.passes.pieces(rollout, rows):
            per_token = algorithm.value_loss(piece, self.policy.values(piece))
            self.recorder.add("train/value_loss", per_token, piece.loss_mask)
            loss = algorithm.critic.coef * algorithm.reduction(per_token, piece.loss_mask, denominator)
            for total, part in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                total += part
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = self.runtime.all_sum(gradient)
        return True


def check_finite(value: Tensor | float, what: str) -> None:
    """Raises NotFinite for a NaN or an infinity, before it reaches the weights."""
    if not math.isfinite(value):
        raise NotFinite(f"the {what}")
