"""From prompts to a rewarded rollout, with all that an algorithm wants to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policylab.algorithms import Algorithm, DynamicSampling
from policylab.data.rollout import Completion, Prompt, Rollout
from policylab.distributed.sharding import gathered
from policylab.rewards.pool import ScoreFuture
from policylab.rollouts.behaviour import greedy
from policylab.rollouts.noise import REFILL, TRAIN, uniforms
from policylab.training.experiment import ExperimentModule, Parts, rewarded


@dataclass(frozen=True)
class Batch:
    """A rollout with its prompts, one a slot, its completions as text, one a row, and their scores to come."""

    prompts: tuple[Prompt, ...]
    rollout: Rollout
    completions: list[Completion]
    scores: ScoreFuture | None  #: None once the rollout has its rewards

    def with_groups(self, slots: Sequence[int], fresh: Batch, size: int) -> Batch:
        """A copy in which the groups of ``fresh`` stand at ``slots``, ``size`` rows each."""
        source = {slot: len(self.prompts) + i for i, slot in enumerate(slots)}
        order = [source.get(slot, slot) for slot in range(len(self.prompts))]
        rows = [group * size + i for group in order for i in range(size)]
        prompts, completions = self.prompts + fresh.prompts, self.completions + fresh.completions
        both = Rollout.concatenate([self.rollout, fresh.rollout])
        return Batch(
            prompts=tuple(prompts[group] for group in order),
            rollout=both.select(torch.tensor(rows, device=both.tokens.device)),
            completions=[completions[row] for row in rows],
            scores=None,
        )


class Collection(ExperimentModule):
    """Collects rollouts for an :class:`~policylab.algorithms.Algorithm`."""

    def __init__(self, algorithm: Algorithm, parts: Parts) -> None:
        super().__init__(parts)
        self.algorithm = algorithm

    def collect(self, prompts: tuple[Prompt, ...]) -> Rollout:
        """``group_size`` completions of each prompt with their rewards, and all that the algorithm wants to know
        of them. With dynamic sampling, prompts that teach nothing are replaced."""
        with gathered(self.policy):  # once: processes may need different numbers of rounds
            batch = self.sample(prompts, range(len(prompts)), round=0)
            if self.algorithm.sampling is not None:
                batch = self.refill(batch, self.algorithm.sampling)
        with self.phase("rollout"):
            batch = replace(batch, rollout=self.estimate_values(self.refer(batch.rollout)))
        rollout = self.reward_batch(batch).rollout  # not before: workers score while the reference is asked
        with self.phase("rollout"):
            if self.algorithm.advantage.needs_greedy:
                rollout = rollout.replace(greedy_rewards=self.greedy_rewards(batch.prompts))
        self.samples = self.describe(rollout, batch.completions, "train")
        return rollout

    def sample(self, prompts: Sequence[Prompt], slots: Sequence[int], round: int) -> Batch:
        """``group_size`` completions of each prompt; their scoring has begun.

        Args:
            slots: place of each prompt among those of this process. With ``round`` it keys the sampling noise.
            round: 0, and counting up when a slot is filled anew.
        """
        size = self.plan.group_size
        first = round * self.plan.sequences + self.global_rank * self.plan.sequences // self.plan.processes
        with self.phase("rollout"):
            samples = [first + slot * size + i for slot in slots for i in range(size)]
            rollout = self.generate(prompts, size, TRAIN, samples)
            groups = torch.tensor(slots, device=rollout.tokens.device).repeat_interleave(size)
            rollout = rollout.replace(group_ids=groups)
        with self.phase("reward"):
            rows = [prompt for prompt in prompts for _ in range(size)]
            completions, scores = self.begin_scoring(rollout, rows)
        return Batch(tuple(prompts), rollout, completions, scores)

    def reward_batch(self, batch: Batch) -> Batch:
        """The batch with its rewards, as soon as they are there."""
        if batch.scores is None:
            return batch
        with self.phase("reward"):
            return replace(batch, rollout=rewarded(batch.rollout, batch.scores()), scores=None)

    def refill(self, batch: Batch, dynamic: DynamicSampling) -> Batch:
        """The rewarded batch with groups without spread replaced by those of fresh prompts, up to ``rounds`` times.

        Each slot has a sequence of prompts of its own, so that the outcome does not depend on how many processes
        share the slots.
        """
        size = self.plan.group_size
        batch = self.reward_batch(batch)
        empty, fresh = list(range(len(batch.prompts))), batch
        for round in range(1, dynamic.rounds + 1):
            flat = ~dynamic.spread(fresh.rollout)[::size]
            self._means.add("train/flat_groups", flat)
            empty = [slot for slot, is_flat in zip(empty, flat.tolist(), strict=True) if is_flat]
            if not empty:
                return batch
            prompts = [self.fresh_prompt(slot, round) for slot in empty]
            fresh = self.reward_batch(self.sample(prompts, empty, round))
            batch = batch.with_groups(empty, fresh, size)
        return batch

    def fresh_prompt(self, slot: int, round: int) -> Prompt:
        """A training prompt that depends on the seed, the iteration, the slot and the round alone."""
        train: Sequence[Prompt] = self.trainer.datamodule.train  # type: ignore[attr-defined]
        slot += self.global_rank * self.plan.prompts // self.plan.processes
        noise = uniforms(self.seed, REFILL, self.iteration, [slot], round)
        return train[int(noise[0, -1] * len(train))]

    def greedy_rewards(self, prompts: Sequence[Prompt]) -> Tensor:
        """Reward of the likeliest completion of each prompt, repeated for its group, ``[B]``."""
        likeliest = self.generate(prompts, 1, TRAIN, range(len(prompts)), greedy)
        rewards = self.judge(likeliest, prompts)[0].rewards
        assert rewards is not None
        return rewards.repeat_interleave(self.plan.group_size)
