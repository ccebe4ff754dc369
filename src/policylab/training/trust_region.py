"""Trust-region updates: one step a rollout along the natural gradient, as long as the KL allows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from policylab.algorithms import Algorithm, LossTerms, TrustRegion
from policylab.data.rollout import Rollout
from policylab.errors import UserError
from policylab.functional import kl
from policylab.functional.conjugate_gradient import conjugate_gradient
from policylab.functional.logprobs import token_logprobs
from policylab.functional.masks import masked_sum
from policylab.functional.ratios import probability_ratio
from policylab.training.experiment import Parts
from policylab.training.fisher import GROUPS, Actor, FisherProducts, fisher_diagonal
from policylab.training.policy_gradient import PolicyGradient
from policylab.training.preflight import Pace
from policylab.training.skipping import NotFinite


@dataclass(frozen=True)
class Step:
    """The full step, to the border of the trust region as the quadratic model sees it."""

    vector: Float[Tensor, " n"]
    kl: float  #: that the quadratic model predicts, nats a token; 0 for no step
    residual: float  #: of the conjugate gradients, relative


@dataclass(frozen=True)
class Outcome:
    """What a policy is like on the rollout that the old one sampled."""

    loss: float
    kl: float  #: KL(old | it) over the vocabulary, nats a token
    kl_sampled: float  #: the same by k3 on the sampled tokens
    clipped: float  #: share of tokens that the surrogate clips
    ratio_max: float


class TrustRegionPolicyGradient(PolicyGradient):
    """Trains the policy with an algorithm whose update is a :class:`~policylab.algorithms.TrustRegion`.

    "Trust Region Policy Optimization", arXiv:1502.05477, appendix C. All sums over sequences are sums over processes,
    so every process takes the same step. Gradients come from ``autograd.grad``, which never runs the hooks by which
    data-parallel wrappers average them.

    Raises:
        UserError: for weights or attention that a trust region cannot do with.
    """

    whole_distributions = True

    def __init__(self, algorithm: Algorithm, parts: Parts) -> None:
        super().__init__(algorithm, parts)
        assert isinstance(algorithm.update, TrustRegion)
        self.region = algorithm.update
        if self.policy.dtype != torch.float32:
            raise UserError(
                f"algo.update=trust_region takes steps too small for {self.policy.dtype} weights; take "
                "model.dtype=float32, and hardware.precision=bf16-mixed for speed"
            )
        for policy in filter(None, (self.policy, self.reference)):
            policy.reader.make_differentiable()

    @property
    def first_pass_tells(self) -> bool:
        """The search comes back to what the policy was."""
        return False

    def seconds_per_iteration(self, pace: Pace) -> float:
        """Sampling; forward passes: reference, gradient (3), products (5 each), length (3), search, critic."""
        region = self.region
        products = region.fisher_share * 5 * (region.cg_iterations + 1)
        passes = 1 + 3 + products + 3 + 4 + (region.critic_epochs if self.algorithm.uses_critic else 0)
        return self.plan.sequences / self.plan.processes * (pace.sample + passes * pace.forward)

    def update(self, rollout: Rollout) -> None:
        """Gradient -> natural direction -> step to the border -> search -> critic."""
        self._ratio_max = torch.ones((), device=self.device)
        trained = rollout.replace(action_mask=rollout.loss_mask, kept=None)
        try:
            self.within_memory(lambda: self.move_policy(trained))
            self.skipped_in_a_row.pop("policy", None)
        except NotFinite as found:
            rows = torch.arange(len(rollout), device=self.device)
            self.leave_out(trained, rows, "policy", [str(found)])
        if self.algorithm.uses_critic:
            self.fit_critic(rollout)

    def move_policy(self, rollout: Rollout) -> None:
        """One step of the policy. ``rollout``: its action mask holds the actions that are trained on."""
        actor = Actor(self.policy, tuple(self.policy.actor_parameters()), self.engine.temperature)
        mask = rollout.action_mask
        actions = int(self.all_sum(mask.sum()))
        denominator = self.all_sum(self.algorithm.reduction.denominator(mask))
        denominator = torch.where(denominator > 0, denominator, 1.0)  # nothing to sum: zero, not NaN
        pieces = self.pieces(rollout, mask.any(-1).nonzero().squeeze(-1))

        loss, gradient = self.surrogate_gradient(actor, pieces, denominator)
        step = self.natural_step(actor, rollout, gradient)
        scale, tried, outcome = self.search(actor, pieces, step, loss, denominator, actions)
        self.tokens_trained += actions if scale else 0
        self._ratio_max = torch.full((), outcome.ratio_max, device=self.device)
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
        values = torch.tensor(list(figures.values()), device=self.device)
        for name, value in zip(figures, values, strict=True):
            self._means.add(name, value)

    def pieces(self, rollout: Rollout, rows: Tensor) -> list[Rollout]:
        """Micro-batches of the rows; none where there are no rows."""
        return [rollout.select(part) for part in self.micro_batches(rollout, rows)]

    # -- the direction ---------------------------------------------------------------------------------

    def surrogate_gradient(
        self, actor: Actor, pieces: Sequence[Rollout], denominator: Tensor
    ) -> tuple[float, Float[Tensor, " n"]]:
        """Loss and its gradient, over all processes; the critic's loss has no part in it."""
        loss = torch.zeros((), device=self.device)
        gradient = actor.flat([None] * len(actor.parameters))
        for piece in pieces:
            share, terms = self.policy_loss(piece, actor.log_distributions(piece), denominator)
            gradient += actor.gradient(share)
            loss += share.detach()
            self._means.add("train/entropy", terms.entropy, piece.action_mask)
        gradient = self.all_sum(gradient)
        loss = self.all_sum(loss)
        self.demand_finite(loss, "loss")
        self.demand_finite(gradient.norm(), "gradient")
        return float(loss), gradient

    def policy_loss(
        self, rollout: Rollout, logp: Float[Tensor, "N V"], denominator: Tensor
    ) -> tuple[Tensor, LossTerms]:
        """The rows' share of the loss of a policy with these distributions."""
        algorithm = self.algorithm
        evaluation = self.policy.evaluate_distributions(
            rollout,
            logp,
            self.engine.temperature,
            values=rollout.values,  # the critic is fitted apart
            entropy_gradient=algorithm.entropy_coef != 0,
            reference=self.reference if algorithm.kl.exact_in_loss else None,
        )
        terms = dataclasses.replace(algorithm.loss_terms(rollout, evaluation), value=None)
        per_token = algorithm.loss(terms, self.kl_coef)
        return algorithm.reduction(per_token, rollout.action_mask, denominator), terms

    def natural_step(self, actor: Actor, rollout: Rollout, gradient: Float[Tensor, " n"]) -> Step:
        """``sqrt(2 max_kl / s F s) s`` with ``(F + damping) s = -gradient``.

        A share of the sequences tells the direction well enough, but not the length: the step fits the very tokens
        that the gradient was taken from, and moves them by more than the Fisher matrix of a few of them can see.
        """
        region = self.region
        every, _ = self.fisher_rows(rollout, 1.0)
        some, group = self.fisher_rows(rollout, region.fisher_share)
        if not gradient.any():
            return Step(torch.zeros_like(gradient), 0.0, 0.0)
        diagonal = None
        if region.preconditioner == "diagonal":
            groups = [self.pieces(rollout, some[group == i]) for i in range(GROUPS)]
            diagonal = fisher_diagonal(actor, groups, self.actions(rollout, some), self.all_sum)
        solution = conjugate_gradient(
            self.fisher(actor, rollout, some),
            -gradient,
            damping=region.damping,
            diagonal=diagonal,
            iterations=region.cg_iterations,
            tolerance=region.cg_tolerance,
        )
        self.demand_finite(solution.residual, "residual of the conjugate gradients")
        if region.fisher_share == 1:
            curvature = float(solution.x @ solution.product)
        else:
            curvature = self.fisher(actor, rollout, every).curvature(solution.x)
        self.demand_finite(curvature, "curvature along the natural gradient")
        if curvature <= 0:  # no direction in which the distributions change
            return Step(torch.zeros_like(gradient), 0.0, solution.residual)
        scale = math.sqrt(2 * region.max_kl / curvature)
        return Step(scale * solution.x, region.max_kl, solution.residual)

    def fisher(self, actor: Actor, rollout: Rollout, rows: Tensor) -> FisherProducts:
        """Products with the Fisher matrix of these sequences of all processes."""
        actions = self.actions(rollout, rows)
        return FisherProducts(actor, self.pieces(rollout, rows), actions, self.region.products, self.all_sum)

    def actions(self, rollout: Rollout, rows: Tensor) -> float:
        """How many there are in these sequences of all processes."""
        return float(self.all_sum(rollout.action_mask[rows].sum()))

    def fisher_rows(self, rollout: Rollout, share: float) -> tuple[Tensor, Tensor]:
        """This process's part of a share of the sequences that are trained on, and their groups.

        They are evenly spread over the trained sequences of all processes, and so are the :data:`GROUPS` groups: how
        many processes share them makes no difference.
        """
        rows = rollout.action_mask.any(-1).nonzero().squeeze(-1)
        counts = torch.zeros(self.plan.processes, dtype=torch.long, device=rows.device)
        counts[self.global_rank] = len(rows)
        counts = self.all_sum(counts)
        total, before = int(counts.sum()), counts[: self.global_rank].sum()
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

        Without a line search the full step is taken. When no step will do, the weights stay as they were, to the bit.

        Returns:
            The share of the full step that was taken (0: none), how many were tried, and what came of it.
        """
        stay = Outcome(loss, 0.0, 0.0, 0.0, 1.0)
        if step.kl == 0:
            return 0.0, 0, stay
        search = self.region.line_search
        scales = [1.0] if search is None else search.scales()
        old = actor.flat(actor.parameters)
        for tried, scale in enumerate(scales, start=1):
            new = old + scale * step.vector
            outcome = self.try_weights(actor, pieces, new, denominator, actions)
            if search is None:
                self.demand_finite(outcome.kl, "KL after the natural gradient's step")
            if search is None or (outcome.loss < loss and outcome.kl <= self.region.max_kl):
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
        """Outcome of other weights, over all processes. Whole distributions are compared a micro-batch at a time."""
        sums = torch.zeros(4, device=self.device)
        ratio_max = torch.ones((), device=self.device)
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
        total, distance, sampled, clipped = self.all_sum(sums).tolist()
        return Outcome(
            loss=total,
            kl=distance / actions,
            kl_sampled=sampled / actions,
            clipped=clipped / actions,
            ratio_max=float(self.all_max(ratio_max)),
        )

    # -- the critic ------------------------------------------------------------------------------------

    def fit_critic(self, rollout: Rollout) -> None:
        """Epochs of minibatches on the value loss alone; the policy does not move."""
        size = self.plan.sequences // self.region.critic_minibatches
        for epoch in range(self.region.critic_epochs):
            for rows in self.minibatches(rollout, epoch, size):
                if self.within_memory(functools.partial(self.critic_gradient, rollout, rows)):
                    self.apply_gradients(rollout, rows, "critic")

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """The optimizer moves the critic alone."""
        return {"critic_grad_norm": self.policy.critic_parameters()}

    def critic_gradient(self, rollout: Rollout, rows: Tensor) -> bool:
        """Fills in the gradient of the critic's weights. False when there is nothing to learn from."""
        algorithm, parameters = self.algorithm, self.policy.critic_parameters()
        assert algorithm.critic is not None
        denominator = self.all_sum(algorithm.reduction.denominator(rollout.loss_mask[rows]))
        if denominator == 0:
            return False
        gradients = [torch.zeros_like(p) for p in parameters]
        for piece in self.pieces(rollout, rows):
            per_token = algorithm.value_loss(piece, self.policy.values(piece))
            self._means.add("train/value_loss", per_token, piece.loss_mask)
            loss = algorithm.critic.coef * algorithm.reduction(per_token, piece.loss_mask, denominator)
            for total, part in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                total += part
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = self.all_sum(gradient)
        return True

    def demand_finite(self, value: Tensor | float, what: str) -> None:
        """Raises NotFinite at a NaN or an infinity, before it reaches the weights."""
        if not math.isfinite(value):
            raise NotFinite(f"the {what}")
