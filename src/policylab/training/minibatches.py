"""Policy-gradient updates by minibatches: epochs over the rollout, an optimizer step on each minibatch."""

from __future__ import annotations

import torch
from torch import Tensor

from policylab.algorithms import MinibatchEpochs, SingleStep
from policylab.data.rollout import Rollout
from policylab.functional import kl
from policylab.functional.ratios import probability_ratio
from policylab.training.means import TRAINED
from policylab.training.updater import Updater


class MinibatchUpdater(Updater[MinibatchEpochs | SingleStep]):
    """Moves the policy along the gradient of the algorithm's loss."""

    def update(self, rollout: Rollout) -> None:
        """Epochs of minibatches, ended early when the policy has moved too far."""
        self.ratio_max = torch.ones((), device=self.runtime.device)
        for epoch in range(self.settings.epochs):
            if epoch and self.settings.reestimate:
                rollout = self.reestimate(rollout)
            for rows in self.minibatches(rollout, epoch, self.plan.minibatch):
                if not self.step(rollout, rows):
                    return

    def reestimate(self, rollout: Rollout) -> Rollout:
        """The rollout with advantages and value targets of the current critic."""
        _, values = self.sampler.recompute(rollout)
        new = self.algorithm.estimate_advantages(rollout.replace(values=values), self.runtime.all_sum)
        return rollout.replace(advantages=new.advantages, returns=new.returns)

    def step(self, rollout: Rollout, rows: Tensor) -> bool:
        """One optimizer step on a minibatch. Returns False, and makes no step, when ``kl_stop`` is exceeded."""
        mask, recorder, device = rollout.loss_mask[rows], self.recorder, self.runtime.device
        if not self.runtime.on_any(len(rows) > 0):  # a step without gradient would follow the momentum
            return True
        denominator = self.runtime.all_sum(self.algorithm.reduction.denominator(mask))
        ratio_max, limit = self.ratio_max, self.settings.kl_stop
        added = self.stepper.accumulate(rollout, rows, lambda piece: self.loss(piece, denominator))
        if limit is not None and added.mean("train/kl_old", self.runtime.all_sum) > limit:
            self.runtime.optimizer.zero_grad(set_to_none=True)
            recorder.add("train/kl_stopped", torch.ones(1, device=device))
            return False
        if self.stepper.apply_gradients(rollout, rows):
            recorder.add(TRAINED, mask.sum())
        else:
            self.ratio_max = ratio_max
        recorder.add("train/kl_stopped", torch.zeros(1, device=device))
        return True

    def loss(self, rollout: Rollout, denominator: Tensor) -> Tensor:
        """These rows' share of the minibatch's loss."""
        algorithm, sampler, mask = self.algorithm, self.sampler, rollout.loss_mask
        evaluation = self.policy.evaluate(
            rollout,
            sampler.engine.temperature,
            entropy_gradient=algorithm.entropy_coef != 0,
            reference=sampler.reference if algorithm.kl.exact_in_loss else None,
        )
        if not sampler.records_exactly and rollout.policy_logprobs is None:  # `gives_old_logprobs`
            rollout = rollout.replace(policy_logprobs=evaluation.logprobs.detach())
        terms = algorithm.loss_terms(rollout, evaluation)
        per_token = algorithm.loss(terms, self.progress.kl_coef)
        with torch.no_grad():
            distance = kl.k3(rollout.old_logprobs, evaluation.logprobs).masked_fill(~mask, 0.0)
            self.recorder.add("train/loss", per_token, mask)
            self.recorder.add("train/entropy", evaluation.entropy, mask)
            self.recorder.add("train/clip_fraction", terms.clipped, mask)
            self.recorder.add("train/kl_old", distance, mask)
            ratio = probability_ratio(evaluation.logprobs - rollout.old_logprobs).masked_fill(~mask, 1.0)
            self.ratio_max = torch.maximum(self.ratio_max, ratio.max())
            if terms.value is not None:
                self.recorder.add("train/value_loss", terms.value, mask)
        return algorithm.reduction(per_token, mask, denominator)
