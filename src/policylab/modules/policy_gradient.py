"""Policy-gradient training: one Lightning batch of prompts is one iteration."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from policylab.algorithms import Algorithm
from policylab.functional import kl
from policylab.functional.advantages import explained_variance
from policylab.functional.masks import masked_moments
from policylab.modules.experiment import ExperimentModule, Parts
from policylab.modules.preflight import Pace
from policylab.rollouts.noise import SHUFFLE, TRAIN, uniforms
from policylab.rollouts.types import Prompt, PromptBatch, Rollout

#: Means over the tokens of all updates of an iteration.
UPDATE_METRICS = (
    "train/loss",
    "train/entropy",
    "train/clip_fraction",
    "train/kl_old",
    "train/value_loss",
    "train/grad_norm",
    "train/kl_stopped",
)


class PolicyGradient(ExperimentModule):
    """Trains the policy with an :class:`~policylab.algorithms.Algorithm`."""

    def __init__(self, algorithm: Algorithm, parts: Parts) -> None:
        super().__init__(parts)
        self.algorithm = algorithm
        self.reference = parts.policy.frozen_copy()
        self.kl_coef = algorithm.kl.controller.initial
        self.track_exact_kl = False  #: set by who wants ``rollout.exact_kl``; it costs two forward passes
        self._ratio_max = torch.ones(())

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: prompts -> rollout -> reward -> shaping -> advantages -> updates -> record."""
        started = time.perf_counter()
        lr = self.set_learning_rate()
        with self.phase("rollout"):
            rollout = self.sample(batch.prompts)
            rollout = self.refer(rollout)
        with self.phase("reward"):
            rollout = self.reward_rollout(rollout, batch.prompts)
        with self.phase("update"):
            rollout = self.algorithm.shape_rewards(rollout, self.kl_coef)
            rollout = self.algorithm.estimate_advantages(rollout, self.all_sum)
            self.update(rollout)
        metrics = self.observe(rollout)
        self.finish_iteration({**metrics, "train/lr": lr}, started)

    def seconds_per_iteration(self, pace: Pace) -> float:
        """Sampling, the reference's forward pass, and a forward and backward pass each epoch."""
        passes = 1 + 3 * self.algorithm.update.epochs
        return self.plan.sequences / self.plan.processes * (pace.sample + passes * pace.forward)

    def sample(self, prompts: tuple[Prompt, ...]) -> Rollout:
        """``group_size`` completions of each prompt."""
        group = self.plan.group_size
        first = self.global_rank * len(prompts) * group
        return self.generate(prompts, group, TRAIN, range(first, first + len(prompts) * group))

    def refer(self, rollout: Rollout) -> Rollout:
        """The rollout with the reference's log-probs and, when somebody watches it, the exact KL."""
        rollout = super().refer(rollout)
        return rollout.replace(exact_kl=self.exact_kl(rollout)) if self.track_exact_kl else rollout

    def exact_kl(self, rollout: Rollout) -> Tensor:
        """KL(policy | reference) over the vocabulary at each action, ``[B, T]``."""

        def evaluate(piece: Rollout) -> Tensor:
            evaluation = self.policy.evaluate(
                piece, self.engine.temperature, entropy_gradient=False, reference=self.reference
            )
            assert evaluation.exact_kl is not None
            return evaluation.exact_kl

        return self.per_token(rollout, evaluate)

    def reward_rollout(self, rollout: Rollout, prompts: tuple[Prompt, ...]) -> Rollout:
        """Rewards each completion, and keeps the texts for people."""
        rows = [prompt for prompt in prompts for _ in range(self.plan.group_size)]
        rollout, completions = self.judge(rollout, rows)
        self.samples = self.describe(rollout, completions, "train")
        return rollout

    def update(self, rollout: Rollout) -> None:
        """Epochs of minibatches, ended early when the policy has moved too far."""
        self._ratio_max = torch.ones((), device=self.device)
        self._means.declare(UPDATE_METRICS, self.device)
        for epoch in range(self.algorithm.update.epochs):
            for rows in self.minibatches(len(rollout), epoch):
                if not self.step(rollout, rows.to(rollout.tokens.device)):
                    return

    def minibatches(self, local: int, epoch: int) -> list[Tensor]:
        """This process's rows of each minibatch.

        The order is drawn over the sequences of all processes, so that a minibatch holds the same sequences
        however many processes share them.
        """
        noise = uniforms(self.seed, SHUFFLE, self.iteration, [epoch], self.plan.sequences)
        order = noise[0].argsort(stable=True)
        first = self.global_rank * local
        return [
            minibatch[(minibatch >= first) & (minibatch < first + local)] - first
            for minibatch in order.split(self.plan.minibatch)
        ]

    def step(self, rollout: Rollout, rows: Tensor) -> bool:
        """One optimizer step on a minibatch. False, without a step, when ``kl_stop`` is exceeded."""
        mask = rollout.action_mask[rows]
        denominator = self.all_sum(self.algorithm.reduction.denominator(mask))
        denominator = torch.where(denominator > 0, denominator, 1.0)  # nothing to sum: zero, not NaN
        moved = [torch.zeros((), device=rollout.tokens.device)]

        def loss_of(part: Tensor) -> Tensor:
            piece = rollout.select(part)
            loss, distance = self.minibatch_loss(piece, denominator)
            moved.append(distance)
            return loss

        self.accumulate(rows, loss_of)
        limit = self.algorithm.update.kl_stop
        if limit is not None:
            distance = self.all_sum(torch.stack(moved).sum()) / self.all_sum(mask.sum()).clamp(min=1)
            if distance > limit:
                self.optimizers().zero_grad(set_to_none=True)  # type: ignore[union-attr]
                self._means.add("train/kl_stopped", torch.ones(1, device=self.device))
                return False
        self.apply_gradients()
        self.tokens_trained += int(self.all_sum(mask.sum()))
        self._means.add("train/kl_stopped", torch.zeros(1, device=self.device))
        return True

    def minibatch_loss(self, rollout: Rollout, denominator: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' share of the minibatch's loss, and their summed distance from the sampling policy."""
        algorithm, mask = self.algorithm, rollout.action_mask
        evaluation = self.policy.evaluate(
            rollout,
            self.engine.temperature,
            entropy_gradient=algorithm.entropy_coef != 0,
            reference=self.reference if algorithm.kl.needs_exact else None,
        )
        terms = algorithm.loss_terms(rollout, evaluation)
        per_token = algorithm.loss(terms, self.kl_coef)
        with torch.no_grad():
            distance = kl.k3(rollout.logprobs, evaluation.logprobs).masked_fill(~mask, 0.0)
            self._means.add("train/loss", per_token, mask)
            self._means.add("train/entropy", evaluation.entropy, mask)
            self._means.add("train/clip_fraction", terms.clipped, mask)
            self._means.add("train/kl_old", distance, mask)
            ratio = (evaluation.logprobs - rollout.logprobs).exp()  # 1 outside the mask
            self._ratio_max = torch.maximum(self._ratio_max, ratio.max())
            if terms.value is not None:
                self._means.add("train/value_loss", terms.value, mask)
        return algorithm.reduction(per_token, mask, denominator), distance.sum()

    def observe(self, rollout: Rollout) -> dict[str, float]:
        """Metrics of the iteration, and the next coefficient of the KL penalty."""
        assert rollout.rewards is not None
        self.rollout = rollout
        self.measure(rollout, self._means, "train")
        every = torch.ones_like(rollout.rewards, dtype=torch.bool)
        _, variance = masked_moments(rollout.rewards[:, None], every[:, None], self.all_sum)
        metrics = {
            "train/reward_std": float(variance.sqrt()),
            "train/ratio_max": float(self.all_max(self._ratio_max)),
            "train/kl_coef": self.kl_coef,
            "tokens": float(self.all_sum(rollout.action_mask.sum())),
        }
        if rollout.values is not None and rollout.returns is not None:
            metrics["train/explained_variance"] = float(
                explained_variance(rollout.values, rollout.returns, rollout.action_mask, self.all_sum)
            )
        self.adapt_kl_coefficient(rollout)
        return metrics

    def adapt_kl_coefficient(self, rollout: Rollout) -> None:
        """The next iteration's coefficient, from the KL that this one measured."""
        assert rollout.ref_logprobs is not None
        total = self.all_sum((rollout.logprobs - rollout.ref_logprobs).sum())
        measured = float(total) / self.plan.sequences
        self.kl_coef = self.algorithm.kl.controller.next(self.kl_coef, measured, self.plan.sequences)
