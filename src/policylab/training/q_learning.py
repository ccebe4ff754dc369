"""Q-learning on tokens: rollouts are added to a replay memory, and updates sample from it."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

from policylab.algorithms.q_learning import QLearning
from policylab.data.rollout import PromptBatch, Rollout
from policylab.functional.behaviour import Behaviour
from policylab.functional.logprobs import entropy
from policylab.functional.reduction import token_sum
from policylab.models.adapted import shared_weights
from policylab.models.policy import Policy
from policylab.rollouts.noise import PREFLIGHT, VALIDATION
from policylab.training.average import Average
from policylab.training.collector import Collector
from policylab.training.means import TRAINED
from policylab.training.metrics import measure, of_iteration
from policylab.training.module import TrainingModule
from policylab.training.parts import Parts
from policylab.training.replay import ReplayMemory


class QTraining(TrainingModule):
    """Trains the policy's language model as a Q-function, with a :class:`~policylab.algorithms.QLearning`.

    Attributes:
        target: the target network; None without one.
    """

    def __init__(self, algorithm: QLearning, parts: Parts) -> None:
        super().__init__(parts)
        self.algorithm = algorithm
        self.target = target_of(parts.policy) if parts.needs.target else None
        self.average = None if self.target is None else Average(self.target, self.policy)
        self.sampler.behaviour = self.behaviour
        self.collector = Collector(self.sampler, parts.plan, parts.train)
        self.replay = ReplayMemory(algorithm.replay, parts.plan, self.sampler)
        self.run_state.stateful.append(self.replay)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: prompts -> rollout -> reward -> replay memory -> updates from it -> record."""
        started = time.perf_counter()
        lr = self.stepper.set_learning_rate()
        rollout, self.samples = self.collector.collect(batch.prompts)
        with self.recorder.phase("update"):
            self.start_values(rollout)
            self.replay.add(rollout)
            for minibatch in self.replay.minibatches():
                if self.step(minibatch):
                    self.move_target()
        metrics = self.observe(rollout)
        self.finish_iteration({**metrics, "train/lr": lr}, started)

    def behaviour(self, stream: int) -> Behaviour | None:
        """The distribution that tokens are drawn from; the preflight samples from the language model itself."""
        if stream == PREFLIGHT:
            return None
        return self.algorithm.exploration.behaviour(self.iteration, validation=stream == VALIDATION)

    @torch.no_grad()
    def start_values(self, rollout: Rollout) -> None:
        """Before the first update, sets the value head to the mean reward. From zero it would be too low for a while,
        and every token tried would look better than expected."""
        if self.iteration or self.policy.critic is None:
            return
        assert rollout.rewards is not None
        mean = self.runtime.all_sum(rollout.rewards.sum()) / self.plan.sequences
        for network in (self.policy, self.target):
            if network is not None and network.critic is not None:
                network.critic.head.bias.fill_(float(mean))

    def step(self, batch: Rollout) -> bool:
        """One optimizer step that moves Q of the chosen tokens towards their targets. False if it was skipped."""
        rows = torch.arange(len(batch), device=self.device)
        tokens = self.runtime.all_sum(batch.action_mask.sum()).float()
        self.stepper.accumulate(batch, rows, lambda piece: self.minibatch_loss(piece, tokens))
        if not self.stepper.apply_gradients(batch, rows):
            return False
        self.replay.updates += 1
        self.recorder.add(TRAINED, batch.action_mask.sum())
        return True

    def minibatch_loss(self, rollout: Rollout, denominator: Tensor) -> Tensor:
        """These rows' share of the minibatch's loss."""
        algorithm, mask, temperature = self.algorithm, rollout.action_mask, self.sampler.engine.temperature
        scores, values = self.policy.scores_of(rollout, temperature)
        estimate = algorithm.estimate(scores, rollout, values)
        with torch.no_grad():
            target = estimate
            if self.target is not None:
                target_scores, target_values = self.target.scores_of(rollout, temperature)
                target = algorithm.estimate(target_scores, rollout, target_values)
            targets = algorithm.targets(target, estimate, rollout)
        errors = algorithm.errors(estimate, targets, rollout)
        loss = algorithm.loss(estimate, errors, rollout)
        with torch.no_grad():
            self.recorder.add("train/loss", loss, mask)
            self.recorder.add("train/td_error", errors.abs(), mask)
            self.recorder.add("train/q_mean", estimate.q)
            self.recorder.add("train/target_mean", targets, mask)
            self.recorder.add("train/entropy", entropy(scores.log_softmax(-1)))
        return token_sum(loss, mask, denominator)

    def move_target(self) -> None:
        """Moves the target network towards the online one, when a step is due."""
        settings = self.algorithm.target
        if settings is None or not (self.target and self.average) or self.replay.updates % settings.every:
            return
        self.average.move(self.target, self.policy, settings.rate)

    def observe(self, rollout: Rollout) -> dict[str, Tensor | float]:
        """Metrics of the iteration."""
        self.rollout = rollout
        measure(rollout, self.recorder.means, "train")
        metrics = of_iteration(rollout, self.runtime.all_sum)
        metrics["train/replay_tokens"] = float(len(self.replay.memory.tokens))
        return metrics | self.algorithm.exploration.metrics(self.iteration)


def target_of(policy: Policy) -> Policy:
    """A frozen copy, including the value head. It shares the tokenizer and frozen weights."""
    shared = {id(policy.tokenizer): policy.tokenizer} | shared_weights(policy)
    return copy.deepcopy(policy, shared).requires_grad_(False).eval()
