"""Q-learning on tokens: rollouts go into a memory, and updates draw from it."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policylab.algorithms.q_learning import EpsilonGreedy, QLearning
from policylab.data.rollout import Prompt, PromptBatch, Rollout
from policylab.functional.logprobs import entropy
from policylab.functional.masks import masked_moments
from policylab.functional.reduction import token_sum
from policylab.models.adapted import shared_weights
from policylab.models.policy import Policy
from policylab.rollouts.behaviour import Behaviour, epsilon_greedy, greedy
from policylab.rollouts.noise import REPLAY, TRAIN, VALIDATION, uniforms
from policylab.rollouts.replay import Memory, ReplayBuffer
from policylab.training.average import Average
from policylab.training.experiment import ExperimentModule, Parts, rewarded
from policylab.training.means import TRAINED
from policylab.training.preflight import Pace


class QTraining(ExperimentModule):
    """Trains the policy's language model as a Q-function, with a :class:`~policylab.algorithms.QLearning`.

    Attributes:
        target: the slower copy that targets are computed with, if there is one.
        replay: finished sequences of all processes; each holds them all.
        updates: optimizer steps so far.
    """

    whole_distributions = True

    def __init__(self, algorithm: QLearning, parts: Parts) -> None:
        super().__init__(parts)
        self.algorithm = algorithm
        self.reference = parts.policy.frozen_copy()
        self.target = None if algorithm.target is None else target_of(parts.policy)
        self.average = None if self.target is None else Average(self.target, self.policy)
        self.replay = ReplayBuffer(algorithm.replay.capacity)
        self.updates = 0

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: prompts -> rollout -> reward -> memory -> updates from memory -> record."""
        started = time.perf_counter()
        lr = self.set_learning_rate()
        with self.phase("rollout"):
            rollout = self.explore(batch.prompts)
        with self.phase("reward"):
            rows = [prompt for prompt in batch.prompts for _ in range(self.plan.group_size)]
            completions, scores = self.begin_scoring(rollout, rows)
        with self.phase("rollout"):
            rollout = self.refer(rollout)
        with self.phase("reward"):
            rollout = rewarded(rollout, scores())
        self.samples = self.describe(rollout, completions, "train")
        with self.phase("update"):
            self.start_values(rollout)
            self.replay.add(self.from_all(Memory.of(rollout, self.iteration)))
            for minibatch in self.minibatches():
                if self.step(minibatch):
                    self.move_target()
        metrics = self.observe(rollout)
        self.finish_iteration({**metrics, "train/lr": lr}, started)

    # -- acting ----------------------------------------------------------------------------------------

    def explore(self, prompts: tuple[Prompt, ...]) -> Rollout:
        """``group_size`` completions of each prompt."""
        group = self.plan.group_size
        first = self.global_rank * len(prompts) * group
        return self.generate(prompts, group, TRAIN, range(first, first + len(prompts) * group))

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        stream: int,
        samples: Sequence[int],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """As everywhere, but from the policy that this training or validation follows."""
        return super().generate(prompts, group_size, stream, samples, behaviour or self.behaviour(stream))

    def behaviour(self, stream: int) -> Behaviour | None:
        """What tokens are drawn from: the language model itself, or mostly its best token."""
        exploration = self.algorithm.exploration
        if isinstance(exploration, EpsilonGreedy) and stream == TRAIN:
            epsilon = exploration.epsilon(self.iteration)
            return partial(epsilon_greedy, epsilon=epsilon, others=exploration.others)
        if isinstance(exploration, EpsilonGreedy) and stream == VALIDATION:
            return greedy
        return None

    # -- learning --------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_values(self, rollout: Rollout) -> None:
        """Before the first update, the value head says the mean reward. From zero it would lag behind for a while, and
        whatever was tried would look better than expected."""
        if self.iteration or self.policy.critic is None:
            return
        assert rollout.rewards is not None
        mean = self.all_sum(rollout.rewards.sum()) / self.plan.sequences
        for network in (self.policy, self.target):
            if network is not None and network.critic is not None:
                network.critic.head.bias.fill_(float(mean))

    def minibatches(self) -> Iterator[Rollout]:
        """This process's share of the sequences from the memory for each update; none while it warms up."""
        replay = self.algorithm.replay
        if len(self.replay) < replay.warmup:
            return
        share = self.plan.minibatch // self.plan.processes
        for row in uniforms(self.seed, REPLAY, self.iteration, range(replay.updates), self.plan.minibatch):
            drawn = self.replay.draw(row).split(share)[self.global_rank]
            self._means.add(
                "train/replay_age", (self.iteration - self.replay.memory.iterations[drawn]).to(self.device)
            )
            yield self.replay.memory.rollout(drawn)

    def step(self, minibatch: Rollout) -> bool:
        """One optimizer step: Q of the chosen tokens moves towards their targets. False when it was left out."""
        batch = minibatch.to(self.device)
        rows = torch.arange(len(batch), device=self.device)
        tokens = self.all_sum(batch.action_mask.sum())
        self.accumulate(batch, rows, lambda piece: self.minibatch_loss(piece, tokens.float()))
        if not self.apply_gradients(batch, rows):
            return False
        self.updates += 1
        self._means.add(TRAINED, batch.action_mask.sum())
        return True

    def minibatch_loss(self, rollout: Rollout, denominator: Tensor) -> Tensor:
        """The rows' share of the minibatch's loss."""
        algorithm, mask, temperature = self.algorithm, rollout.action_mask, self.engine.temperature
        scores, values = self.policy.scores_of(rollout, temperature)
        judgement = algorithm.judge(scores, rollout, values)
        with torch.no_grad():
            target = judgement
            if self.target is not None:
                target_scores, target_values = self.target.scores_of(rollout, temperature)
                target = algorithm.judge(target_scores, rollout, target_values)
            targets = algorithm.targets(target, judgement, rollout)
        errors = algorithm.errors(judgement, targets, rollout)
        loss = algorithm.loss(judgement, errors, rollout)
        with torch.no_grad():
            self._means.add("train/loss", loss, mask)
            self._means.add("train/td_error", errors.abs(), mask)
            self._means.add("train/q_mean", judgement.q)
            self._means.add("train/target_mean", targets, mask)
            self._means.add("train/entropy", entropy(scores.log_softmax(-1)))
        return token_sum(loss, mask, denominator)

    def move_target(self) -> None:
        """The target network's step towards the online one, when it is due."""
        settings = self.algorithm.target
        if settings is None or not (self.target and self.average) or self.updates % settings.every:
            return
        self.average.move(self.target, self.policy, settings.rate)

    # -- records and state -----------------------------------------------------------------------------

    def seconds_per_iteration(self, pace: Pace) -> float:
        """Sampling, the reference's forward pass, and a forward and backward pass (and the target's) an update."""
        passes = 3 if self.target is None else 4
        replayed = self.plan.minibatch * self.plan.updates * passes
        seconds = self.plan.sequences * (pace.sample + pace.forward) + replayed * pace.forward
        return seconds / self.plan.processes

    def observe(self, rollout: Rollout) -> dict[str, Tensor | float]:
        """Metrics of the iteration."""
        assert rollout.rewards is not None
        self.rollout = rollout
        self.measure(rollout, self._means, "train")
        every = torch.ones_like(rollout.rewards, dtype=torch.bool)
        _, variance = masked_moments(rollout.rewards[:, None], every[:, None], self.all_sum)
        metrics: dict[str, Tensor | float] = {
            "train/reward_std": variance.sqrt(),
            "train/replay_tokens": float(self.replay.tokens),
            "tokens": self.all_sum(rollout.action_mask.sum()),
        }
        if isinstance(self.algorithm.exploration, EpsilonGreedy):
            metrics["train/epsilon"] = self.algorithm.exploration.epsilon(self.iteration)
        return metrics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The target network is among the weights; the memory goes beside them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["policylab"] |= {"replay": self.replay.state_dict(), "updates": self.updates}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.replay.load_state_dict(checkpoint["policylab"]["replay"])
        self.updates = checkpoint["policylab"]["updates"]


def target_of(policy: Policy) -> Policy:
    """A frozen copy, value head included; the tokenizer is shared, and so is what never trains."""
    shared = {id(policy.tokenizer): policy.tokenizer} | shared_weights(policy)
    return copy.deepcopy(policy, shared).requires_grad_(False).eval()
