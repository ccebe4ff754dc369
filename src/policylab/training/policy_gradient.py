"""Policy-gradient training: one Lightning batch of prompts is one iteration."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from policylab.algorithms import Algorithm, MinibatchEpochs, MovingReference, SingleStep
from policylab.data.rollout import PromptBatch, Rollout
from policylab.functional import kl
from policylab.functional.advantages import explained_variance
from policylab.functional.masks import masked_moments
from policylab.functional.ragged import on_device
from policylab.functional.ratios import probability_ratio
from policylab.rollouts.noise import SHUFFLE, uniforms
from policylab.training.average import Average
from policylab.training.collection import Collection
from policylab.training.experiment import Parts
from policylab.training.means import TRAINED
from policylab.training.preflight import Pace


class PolicyGradient(Collection):
    """Trains the policy with an :class:`~policylab.algorithms.Algorithm`."""

    def __init__(self, algorithm: Algorithm, parts: Parts) -> None:
        super().__init__(algorithm, parts)
        self.reference = None if algorithm.kl.reference is None else parts.policy.frozen_copy()
        if self.reference is not None and self.reference_moves:
            self.average = Average(self.reference.lm, self.policy.lm)
        self.kl_coef = algorithm.kl.controller.initial
        self.track_exact_kl = False  #: set by who wants ``rollout.exact_kl``; it costs two forward passes
        self._ratio_max = torch.ones(())

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: prompts -> rollout -> reward -> shaping -> advantages -> updates -> record."""
        started = time.perf_counter()
        lr = self.set_learning_rate()
        rollout = self.collect(batch.prompts)
        with self.phase("update"):
            rollout = self.algorithm.select(rollout)
            if self.recomputes_logprobs:
                logprobs, values = self.recompute(rollout)
                rollout = rollout.replace(policy_logprobs=logprobs, values=values)
                rollout = self.algorithm.correct_sampler(rollout)
            rollout = self.algorithm.shape_rewards(rollout, self.kl_coef)
            rollout = self.algorithm.estimate_advantages(rollout, self.all_sum)
            self.update(rollout)
        self.move_reference()
        metrics = self.observe(rollout)
        self.finish_iteration({**metrics, "train/lr": lr}, started)
        self.adapt_kl_coefficient()

    def seconds_per_iteration(self, pace: Pace) -> float:
        """Sampling, the forward pass of the reference (and of what else is recomputed), and a forward and backward
        pass each epoch."""
        update = self.algorithm.update
        again = update.epochs - 1 if isinstance(update, MinibatchEpochs) and update.reestimate else 0
        recomputed = 1 + self.recomputes_logprobs + 2 * self.algorithm.kl.exact_in_reward + again
        passes = recomputed + 3 * update.epochs
        return self.plan.sequences / self.plan.processes * (pace.sample + passes * pace.forward)

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether the sampled tokens go through the policy once more before the update.

        In full precision the log-probs recorded by an engine of ours are those of the policy, which the preflight
        checks. Another engine, or lower precision, drifts from the policy that is trained.
        """
        if self.algorithm.needs_policy_logprobs:
            return True
        return not self.recorded_agrees and not self.first_pass_tells

    @property
    def recorded_agrees(self) -> bool:
        """Whether log-probs recorded while sampling are those of the policy's full forward pass, up to rounding."""
        return self.engine.exact and self.in_full_precision

    @property
    def first_pass_tells(self) -> bool:
        """Whether the update's only pass is over the policy that sampled, and nobody asks for its log-probs before."""
        return self.plan.updates == 1 and self.algorithm.kl.place != "reward"

    def refer(self, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probs and, when it counts or somebody watches it, the exact KL."""
        rollout = super().refer(rollout)
        wanted = self.track_exact_kl or self.algorithm.kl.exact_in_reward
        return rollout.replace(exact_kl=self.exact_kl(rollout)) if wanted and self.reference else rollout

    def exact_kl(self, rollout: Rollout) -> Tensor:
        """KL(policy | reference) over the vocabulary at each action, ``[B, T]``."""

        def evaluate(piece: Rollout) -> Tensor:
            evaluation = self.policy.evaluate(
                piece, self.engine.temperature, entropy_gradient=False, reference=self.reference
            )
            assert evaluation.exact_kl is not None
            return evaluation.exact_kl

        return self.per_token(rollout, evaluate)

    def update(self, rollout: Rollout) -> None:
        """Epochs of minibatches, ended early when the policy has moved too far."""
        self._ratio_max = torch.ones((), device=self.device)
        settings = self.algorithm.update
        assert isinstance(settings, MinibatchEpochs | SingleStep)
        for epoch in range(settings.epochs):
            if epoch and settings.reestimate:
                rollout = self.reestimate(rollout)
            for rows in self.minibatches(rollout, epoch, self.plan.minibatch):
                if not self.step(rollout, rows, settings.kl_stop):
                    return

    def reestimate(self, rollout: Rollout) -> Rollout:
        """The rollout with advantages and value targets of the present critic."""
        _, values = self.recompute(rollout)
        seen = self.algorithm.estimate_advantages(rollout.replace(values=values), self.all_sum)
        return rollout.replace(advantages=seen.advantages, returns=seen.returns)

    def minibatches(self, rollout: Rollout, epoch: int, size: int) -> list[Tensor]:
        """This process's rows of each minibatch of ``size`` sequences, without those that are left out of training.

        The order is drawn over the sequences of all processes, so that a minibatch holds the same sequences
        however many processes share them.
        """
        kept = rollout.loss_mask.any(-1).cpu()  # one copy, and one back
        noise = uniforms(self.seed, SHUFFLE, self.iteration, [epoch], self.plan.sequences)
        order = noise[0].argsort(stable=True) - self.global_rank * len(rollout)
        shares = [rows[(rows >= 0) & (rows < len(rollout))] for rows in order.split(size)]
        return on_device([rows[kept[rows]] for rows in shares], rollout.tokens.device)

    def step(self, rollout: Rollout, rows: Tensor, kl_stop: float | None) -> bool:
        """One optimizer step on a minibatch. False, without a step, when ``kl_stop`` is exceeded."""
        mask = rollout.loss_mask[rows]
        if not self.on_any(len(rows) > 0):  # a step would follow the optimizer's momentum alone
            return True
        denominator = self.all_sum(self.algorithm.reduction.denominator(mask))
        ratio_max = self._ratio_max
        seen = self.accumulate(rollout, rows, lambda piece: self.minibatch_loss(piece, denominator))
        if kl_stop is not None and seen.mean("train/kl_old", self.all_sum) > kl_stop:
            self.optimizers().zero_grad(set_to_none=True)  # type: ignore[union-attr]
            self._means.add("train/kl_stopped", torch.ones(1, device=self.device))
            return False
        if self.apply_gradients(rollout, rows):
            self._means.add(TRAINED, mask.sum())
        else:
            self._ratio_max = ratio_max
        self._means.add("train/kl_stopped", torch.zeros(1, device=self.device))
        return True

    def minibatch_loss(self, rollout: Rollout, denominator: Tensor) -> Tensor:
        """The rows' share of the minibatch's loss."""
        algorithm, mask = self.algorithm, rollout.loss_mask
        evaluation = self.policy.evaluate(
            rollout,
            self.engine.temperature,
            entropy_gradient=algorithm.entropy_coef != 0,
            reference=self.reference if algorithm.kl.exact_in_loss else None,
        )
        if not self.recorded_agrees and rollout.policy_logprobs is None:
            rollout = rollout.replace(policy_logprobs=evaluation.logprobs.detach())  # the first pass tells
        terms = algorithm.loss_terms(rollout, evaluation)
        per_token = algorithm.loss(terms, self.kl_coef)
        with torch.no_grad():
            distance = kl.k3(rollout.old_logprobs, evaluation.logprobs).masked_fill(~mask, 0.0)
            self._means.add("train/loss", per_token, mask)
            self._means.add("train/entropy", evaluation.entropy, mask)
            self._means.add("train/clip_fraction", terms.clipped, mask)
            self._means.add("train/kl_old", distance, mask)
            ratio = probability_ratio(evaluation.logprobs - rollout.old_logprobs).masked_fill(~mask, 1.0)
            self._ratio_max = torch.maximum(self._ratio_max, ratio.max())
            if terms.value is not None:
                self._means.add("train/value_loss", terms.value, mask)
        return algorithm.reduction(per_token, mask, denominator)

    def observe(self, rollout: Rollout) -> dict[str, Tensor | float]:
        """Metrics of the iteration."""
        assert rollout.rewards is not None
        self.rollout = rollout
        if rollout.kept is not None and not (self.algorithm.sampling is self.algorithm.truncation is None):
            self._means.add("train/kept", rollout.kept)
        if rollout.importance is not None:
            self._means.add("train/importance", rollout.importance, rollout.action_mask)
        self.measure(rollout, self._means, "train")
        every = torch.ones_like(rollout.rewards, dtype=torch.bool)
        _, variance = masked_moments(rollout.rewards[:, None], every[:, None], self.all_sum)
        metrics: dict[str, Tensor | float] = {
            "train/reward_std": variance.sqrt(),
            "train/ratio_max": self.all_max(self._ratio_max),
            "train/kl_coef": self.kl_coef,
            "tokens": self.all_sum(rollout.action_mask.sum()),
        }
        if rollout.values is not None and rollout.returns is not None:
            metrics["train/explained_variance"] = explained_variance(
                rollout.values, rollout.returns, rollout.loss_mask, self.all_sum
            )
        return metrics

    @property
    def reference_moves(self) -> bool:
        return isinstance(self.algorithm.kl.reference, MovingReference)

    def move_reference(self) -> None:
        """A moving reference follows the policy."""
        moving = self.algorithm.kl.reference
        if isinstance(moving, MovingReference) and self.reference and self.average:
            self.average.move(self.reference.lm, self.policy.lm, 1 - moving.decay)

    def adapt_kl_coefficient(self) -> None:
        """The next iteration's coefficient, from the KL that this one has measured."""
        measured = self.metrics.get("train/kl", math.nan)
        if not math.isfinite(measured):  # it would stay with the coefficient for ever
            return
        self.kl_coef = self.algorithm.kl.controller.next(self.kl_coef, measured, self.plan.sequences)
