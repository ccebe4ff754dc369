"""From the prompts of an iteration to its rollout: groups of completions with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policylab.algorithms import DynamicSampling
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Completion, Prompt, Rollout, Sample
from policylab.distributed.sharding import gathered
from policylab.functional.behaviour import greedy
from policylab.rewards.scorer import ScoreFuture
from policylab.rollouts.noise import REFILL, TRAIN, uniforms
from policylab.training.metrics import describe
from policylab.training.sampler import Sampler, rewarded


@dataclass(frozen=True)
class Batch:
    """A rollout: one prompt per slot, one completion per row, and the pending scores."""

    prompts: tuple[Prompt, ...]
    rollout: Rollout
    completions: list[Completion]
    scores: ScoreFuture | None  #: None once the rollout has its rewards

    def with_groups(self, slots: Sequence[int], fresh: Batch, size: int) -> Batch:
        """A copy in which the groups of ``fresh``, ``size`` rows each, replace those at ``slots``."""
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


class Collector:
    """Collects the rollouts of training.

    Args:
        train: prompts for groups that are replaced.
        dynamic: which groups are replaced; None keeps all.
        greedy_rewards: whether each prompt's likeliest completion is scored as well.
        values: whether the rollout gets the critic's values.
    """

    def __init__(
        self,
        sampler: Sampler,
        plan: BatchPlan,
        train: Sequence[Prompt],
        *,
        dynamic: DynamicSampling | None = None,
        greedy_rewards: bool = False,
        values: bool = False,
    ) -> None:
        self.sampler = sampler
        self.runtime = sampler.runtime
        self.recorder = sampler.recorder
        self.plan = plan
        self.train = train
        self.dynamic = dynamic
        self.wants_greedy_rewards = greedy_rewards
        self.wants_values = values

    def collect(self, prompts: tuple[Prompt, ...], *, exact_kl: bool = False) -> tuple[Rollout, list[Sample]]:
        """The rollout the algorithm needs, ``group_size`` completions of each prompt, and samples for display.

        Args:
            exact_kl: whether the rollout gets the exact KL to the reference, which costs two forward passes.
        """
        sampler, phase = self.sampler, self.recorder.phase
        with gathered(sampler.policy):  # around all rounds: processes may need different numbers of them
            batch = self.sample(prompts, range(len(prompts)), round=0)
            if self.dynamic is not None:
                batch = self.refill(batch, self.dynamic)
        with phase("rollout"):
            rollout = sampler.add_ref_logprobs(batch.rollout)
            rollout = sampler.add_exact_kl(rollout) if exact_kl else rollout
            rollout = sampler.add_values(rollout) if self.wants_values else rollout
        # awaited only here, because workers score while the reference is evaluated
        rollout = self.await_rewards(replace(batch, rollout=rollout)).rollout
        with phase("rollout"):
            if self.wants_greedy_rewards:
                rollout = rollout.replace(greedy_rewards=self.greedy_rewards(batch.prompts))
        return rollout, describe(rollout, batch.completions, "train", sampler.progress.iteration + 1)

    def sample(self, prompts: Sequence[Prompt], slots: Sequence[int], round: int) -> Batch:
        """``group_size`` completions of each prompt; their scoring has begun.

        Args:
            slots: position of each prompt among those of this process. With ``round`` it keys the sampling noise.
            round: 0 at first, then 1, 2, ... each time a slot is filled again.
        """
        size = self.plan.group_size
        first = round * self.plan.sequences + self.runtime.rank * self.plan.sequences // self.plan.processes
        with self.recorder.phase("rollout"):
            samples = [first + slot * size + i for slot in slots for i in range(size)]
            rollout = self.sampler.generate(prompts, size, TRAIN, samples)
            groups = torch.tensor(slots, device=rollout.tokens.device).repeat_interleave(size)
            rollout = rollout.replace(group_ids=groups)
        with self.recorder.phase("reward"):
            rows = [prompt for prompt in prompts for _ in range(size)]
            completions, scores = self.sampler.score(rollout, rows)
        return Batch(tuple(prompts), rollout, completions, scores)

    def await_rewards(self, batch: Batch) -> Batch:
        """The batch with its rewards."""
        if batch.scores is None:
            return batch
        with self.recorder.phase("reward"):
            return replace(batch, rollout=rewarded(batch.rollout, batch.scores()), scores=None)

    def refill(self, batch: Batch, dynamic: DynamicSampling) -> Batch:
        """Waits for the rewards, and replaces groups whose rewards are all equal by groups of new prompts, up to
        ``rounds`` times.

        Each slot has its own sequence of new prompts, so the result does not depend on the number of processes.
        """
        size = self.plan.group_size
        batch = self.await_rewards(batch)
        empty, fresh = list(range(len(batch.prompts))), batch
        for round in range(1, dynamic.rounds + 1):
            flat = ~dynamic.spread(fresh.rollout)[::size]
            self.recorder.add("train/flat_groups", flat)
            empty = [slot for slot, is_flat in zip(empty, flat.tolist(), strict=True) if is_flat]
            if not empty:
                return batch
            prompts = [self.fresh_prompt(slot, round) for slot in empty]
            fresh = self.await_rewards(self.sample(prompts, empty, round))
            batch = batch.with_groups(empty, fresh, size)
        return batch

    def fresh_prompt(self, slot: int, round: int) -> Prompt:
        """A training prompt that depends only on the seed, the iteration, the slot and the round."""
        slot += self.runtime.rank * self.plan.prompts // self.plan.processes
        sampler = self.sampler
        noise = uniforms(sampler.seed, REFILL, sampler.progress.iteration, [slot], round)
        return self.train[int(noise[0, -1] * len(self.train))]

    def greedy_rewards(self, prompts: Sequence[Prompt]) -> Tensor:
        """Reward of the likeliest completion of each prompt, repeated for its group, ``[B]``."""
        first = self.runtime.rank * self.plan.prompts // self.plan.processes
        samples = range(first, first + len(prompts))  # keys of an environment's random numbers
        likeliest = self.sampler.generate(prompts, 1, TRAIN, samples, greedy)
        _, scores = self.sampler.score(likeliest, prompts)
        rewards = rewarded(likeliest, scores()).rewards
        assert rewards is not None
        return rewards.repeat_interleave(self.plan.group_size)
