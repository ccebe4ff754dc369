"""Trust-region updates: one step per rollout along the natural gradient, with a limit on the KL."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from policylab.algorithms import Algorithm, TrustRegion
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Rollout
from policylab.errors import UserError
from policylab.training.fisher import Actor
from policylab.training.line_search import Objective, search
from policylab.training.natural_step import NaturalStep
from policylab.training.sampler import Sampler
from policylab.training.skipping import NotFinite
from policylab.training.stepper import Stepper
from policylab.training.updater import Updater


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
        self.natural_step = NaturalStep(self.settings, self.passes)

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
        objective = Objective(self.algorithm, self.sampler, actor, rollout)
        loss, gradient = objective.gradient()
        step = self.natural_step(actor, rollout, gradient)
        scale, tried, outcome = search(objective, step, loss, self.settings)
        self.progress.tokens_trained += objective.actions if scale else 0
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
