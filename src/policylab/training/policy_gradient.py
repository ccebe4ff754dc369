"""Policy-gradient training: one Lightning batch of prompts is one iteration."""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from policylab.algorithms import Algorithm, MovingReference
from policylab.data.rollout import PromptBatch, Rollout
from policylab.functional.advantages import explained_variance
from policylab.training.average import Average
from policylab.training.collector import Collector
from policylab.training.metrics import measure, of_iteration
from policylab.training.module import TrainingModule
from policylab.training.parts import Parts
from policylab.training.updater import Updater


class PolicyGradient(TrainingModule):
    """Trains the policy with an :class:`~policylab.algorithms.Algorithm`.

    Attributes:
        track_exact_kl: whether rollouts get ``exact_kl`` even if the algorithm does not need it.
    """

    def __init__(self, algorithm: Algorithm, parts: Parts, updater: type[Updater[Any]]) -> None:
        super().__init__(parts)
        self.algorithm = algorithm
        if self.reference_moves and self.reference is not None:
            self.average = Average(self.reference.lm, self.policy.lm)
        self.progress.kl_coef = algorithm.kl.controller.initial
        self.track_exact_kl = False
        self.collector = Collector(
            self.sampler,
            parts.plan,
            parts.train,
            dynamic=algorithm.sampling,
            greedy_rewards=algorithm.advantage.needs_greedy,
            values=True,
        )
        self.updater = updater(algorithm, parts.plan, self.sampler, self.stepper)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: prompts -> rollout -> reward -> shaping -> advantages -> updates -> record."""
        started, algorithm = time.perf_counter(), self.algorithm
        lr = self.stepper.set_learning_rate()
        exact_kl = self.track_exact_kl or algorithm.kl.exact_in_reward
        rollout, self.samples = self.collector.collect(batch.prompts, exact_kl=exact_kl)
        with self.recorder.phase("update"):
            rollout = algorithm.select(rollout)
            if algorithm.recomputes_logprobs(exact=self.sampler.records_exactly):
                logprobs, values = self.sampler.recompute(rollout)
                rollout = rollout.replace(policy_logprobs=logprobs, values=values)
                rollout = algorithm.correct_sampler(rollout)
            rollout = algorithm.shape_rewards(rollout, self.progress.kl_coef)
            rollout = algorithm.estimate_advantages(rollout, self.runtime.all_sum)
            self.updater.update(rollout)
        self.move_reference()
        metrics = self.observe(rollout)
        self.finish_iteration({**metrics, "train/lr": lr}, started)
        self.adapt_kl_coefficient()

    def observe(self, rollout: Rollout) -> dict[str, Tensor | float]:
        """Metrics of the iteration."""
        self.rollout = rollout
        algorithm, add = self.algorithm, self.recorder.add
        if rollout.kept is not None and not (algorithm.sampling is algorithm.truncation is None):
            add("train/kept", rollout.kept)
        if rollout.importance is not None:
            add("train/importance", rollout.importance, rollout.action_mask)
        measure(rollout, self.recorder.means, "train")
        metrics = of_iteration(rollout, self.runtime.all_sum)
        metrics["train/ratio_max"] = self.runtime.all_max(self.updater.ratio_max)
        metrics["train/kl_coef"] = self.progress.kl_coef
        if rollout.values is not None and rollout.returns is not None:
            metrics["train/explained_variance"] = explained_variance(
                rollout.values, rollout.returns, rollout.loss_mask, self.runtime.all_sum
            )
        return metrics

    def move_reference(self) -> None:
        """A moving reference follows the policy."""
        moving = self.algorithm.kl.reference
        if isinstance(moving, MovingReference) and self.reference is not None:
            self.average.move(self.reference.lm, self.policy.lm, 1 - moving.decay)

    def adapt_kl_coefficient(self) -> None:
        """Sets the next iteration's coefficient from this iteration's KL. A KL that is not finite is ignored: the
        coefficient would never recover from it."""
        measured = self.metrics.get("train/kl", math.nan)
        if math.isfinite(measured):
            controller, progress = self.algorithm.kl.controller, self.progress
            progress.kl_coef = controller.next(progress.kl_coef, measured, self.plan.sequences)
